"""Next-token cross-entropy over packed rows, without all the logits in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jvlm.models import device_ops
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM

Sums = dict[str, Float[Array, ""]]


def loss_sums(model: VLM, batch: PackedBatch, block: int | None = None) -> Sums:
    """Unnormalised sums over the targets of a batch, so that batches of different sizes add up exactly.

    Args:
      block: tokens whose logits exist at a time; None chooses by memory. Only those that are learnt have any.

    Returns:
      "loss": weighted cross-entropy in nats; "weight": sum of the weights; "correct": targets (of weight > 0) that
      are the most likely token; "targets": their number. What layers report comes as "aux/" and its name, averaged
      over those layers and times "weight"; "aux/loss" among it is part of what is minimised.
    """
    hidden, _, aux = model.hidden(batch)
    with jax.named_scope("loss"):
        targets, weights = _next_tokens(batch)
        kernel, vocabulary_first = model.decoder.output_kernel()
        found = device_ops.current().cross_entropy_sum(
            hidden, kernel, targets, weights, vocabulary_first=vocabulary_first, block=block
        )
        total = weights.sum()
        return {
            **{f"aux/{name}": value.mean() * total for name, value in aux.items()},
            "loss": found.loss,
            "weight": total,
            "correct": found.correct.astype(jnp.float32),
            "targets": (weights > 0).sum().astype(jnp.float32),
        }


def _next_tokens(batch: PackedBatch):
    """(targets, weights), each [B, S]: position t predicts token t + 1, the last of a conversation nothing."""
    tokens, weights = jnp.asarray(batch.tokens), jnp.asarray(batch.loss_weights)
    segments = jnp.asarray(batch.segment_ids)
    same = segments[:, 1:] == segments[:, :-1]
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return targets, jnp.pad(weights[:, 1:] * same, ((0, 0), (0, 1)))

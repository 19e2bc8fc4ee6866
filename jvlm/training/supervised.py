"""Supervised training: next-token cross-entropy over packed sequences, without all the logits in memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jvlm.models import device_ops
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.training.neftune import EmbeddingNoise, Where
from jvlm.training.task import Loss, Mean, Task
from jvlm.validation import check_fields


@dataclasses.dataclass(frozen=True)
class SupervisedTask(Task):
    """Cross-entropy of the supervised tokens, each with its loss weight, plus what layers ask to have minimised.

    Attributes:
      neftune_alpha: scale of NEFTune's noise on the embeddings in training (`jvlm.training.neftune`); 0 adds none, 5 is
        the usual value.
      neftune_where: "text" adds it before vision tokens are put in, as transformers and TRL do; "merged" afterwards, to
        vision tokens as well, as Idefics2's training code does.
    """

    neftune_alpha: float = 0.0
    neftune_where: Where = "text"

    def __post_init__(self):
        check_fields(self, "task.", {"neftune_alpha": "[0, inf)"})

    def loss(
        self, model: VLM, batch: PackedBatch, *, reference: VLM | None = None, rng: jax.Array | None = None
    ) -> Loss:
        noise = None
        if rng is not None and self.neftune_alpha:
            noise = EmbeddingNoise(rng, self.neftune_alpha, self.neftune_where)
        return supervised_loss(model, batch, noise=noise)


def supervised_loss(
    model: VLM, batch: PackedBatch, block: int | None = None, *, noise: EmbeddingNoise | None = None
) -> Loss:
    """Return the cross-entropy of a batch in nats.

    Its metrics are "loss", "token_acc" (targets of weight > 0 that are the most likely token) and what layers report:
    a mixture of experts "aux_loss", which is minimised as well, and "router/...", each averaged over those layers.

    Args:
      block: tokens whose logits exist at a time; None chooses by memory. Only supervised tokens have any.
      noise: added to the embeddings.
    """
    hidden, _, aux = model.hidden(batch, noise)
    with jax.named_scope("loss"):
        targets, weights = next_tokens(batch)
        kernel, vocabulary_first = model.decoder.output_kernel()
        sums = device_ops.current().cross_entropy_sum(
            hidden, kernel, targets, weights, vocabulary_first=vocabulary_first, block=block
        )
        weight = weights.sum()
        reports = {name: value.mean() * weight for name, value in aux.items()}
        metrics = {
            "loss": Mean(sums.loss, weight),
            "token_acc": Mean(sums.correct.astype(jnp.float32), (weights > 0).sum().astype(jnp.float32)),
            **{"aux_loss" if name == "loss" else name: Mean(value, weight) for name, value in reports.items()},
        }
        return Loss(sums.loss + reports.get("loss", 0.0), weight, metrics)


def next_tokens(batch: PackedBatch) -> tuple[Int[Array, "B S"], Float[Array, "B S"]]:
    """Return (targets, weights): position t predicts token t + 1, the last of a conversation nothing."""
    tokens, weights = jnp.asarray(batch.tokens), jnp.asarray(batch.loss_weights)
    segments = jnp.asarray(batch.segment_ids)
    same = segments[:, 1:] == segments[:, :-1]
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return targets, jnp.pad(weights[:, 1:] * same, ((0, 0), (0, 1)))


def token_log_probs(model: VLM, batch: PackedBatch, block: int = 256) -> Float[Array, "B S"]:
    """Return the log-probability of the token after each position, float32; 0 where `next_tokens` has weight 0.

    For preference, policy and distillation losses. Logits of ``block`` positions exist at a time, and are computed
    again for the gradient.
    """
    hidden = model.hidden(batch).hidden
    targets, weights = next_tokens(batch)
    B, S = targets.shape
    count = -(-S // block)
    padding = ((0, 0), (0, count * block - S))

    def blocks(x: Array) -> Array:
        return jnp.moveaxis(jnp.pad(x, padding + ((0, 0),) * (x.ndim - 2)).reshape(B, count, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def log_probs(hidden_BTD: Array, targets_BT: Array) -> Array:
        logits = model.decoder.logits(hidden_BTD).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, targets_BT[..., None], -1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, -1)

    _, found = jax.lax.scan(lambda _, xs: (None, log_probs(*xs)), None, (blocks(hidden), blocks(targets)))
    found = jnp.moveaxis(found, 0, 1).reshape(B, count * block)[:, :S]
    return jnp.where(weights > 0, found, 0.0)

"""Next-token cross-entropy over packed rows, without all the logits in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM

Sums = dict[str, Float[Array, ""]]


def loss_sums(model: VLM, batch: PackedBatch, chunk: int) -> Sums:
    """Unnormalised sums over the targets of a batch, so that batches of different sizes add up exactly.

    Returns:
      "loss": weighted cross-entropy in nats; "weight": sum of the weights; "correct": targets (of weight > 0) that
      are the most likely token; "targets": their number.
    """
    hidden, _ = model.hidden(batch)
    with jax.named_scope("loss"):
        return _sums(model, hidden, batch, chunk)


def _sums(model: VLM, hidden, batch: PackedBatch, chunk: int) -> Sums:
    tokens, weights = jnp.asarray(batch.tokens), jnp.asarray(batch.loss_weights)
    segments = jnp.asarray(batch.segment_ids)
    same = segments[:, 1:] == segments[:, :-1]
    # position t predicts token t + 1; the last of a row predicts nothing
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))).reshape(-1)
    weights = jnp.pad(weights[:, 1:] * same, ((0, 0), (0, 1))).reshape(-1)
    x = hidden.reshape(-1, hidden.shape[-1])

    def part(x, targets, weights) -> Sums:
        logits = model.decoder.logits(x)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        learnt = weights > 0
        return {
            "loss": jnp.sum(weights * (log_total - chosen)),
            "weight": jnp.sum(weights),
            "correct": jnp.sum(learnt & (logits.argmax(-1) == targets)).astype(jnp.float32),
            "targets": jnp.sum(learnt).astype(jnp.float32),
        }

    count = -(-x.shape[0] // chunk)
    if count == 1:
        return part(x, targets, weights)
    pad = count * chunk - x.shape[0]
    split = [
        jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1)).reshape(count, chunk, *a.shape[1:])
        for a in (x, targets, weights)
    ]

    def step(total: Sums, inputs) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, part(*inputs)), None

    zero = {name: jnp.zeros((), jnp.float32) for name in ("loss", "weight", "correct", "targets")}
    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), zero, tuple(split))[0]

"""Log-probabilities of answers in packed sequences, under the model that is trained and under its reference.

Axes: B sequences, S tokens, N segments of a sequence that there is room for.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jvlm.adapters.attach import detach
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.training.supervised import next_tokens, token_log_probs

Reference = Literal["copy", "adapter_off", "precomputed"]


class TokenLogProbs(NamedTuple):
    """Log-probabilities of the tokens of answers; 0 elsewhere.

    Attributes:
      policy: under the model that is trained.
      reference: under its reference, without a gradient; None where there is none.
      aux: what the model's layers report, by name.
    """

    policy: Float[Array, "B S"]
    reference: Float[Array, "B S"] | None
    aux: dict[str, Array]


def of_both(model: VLM, batch: PackedBatch, reference: VLM | None = None) -> TokenLogProbs:
    """Return log-probabilities under a model and its reference.

    Images are encoded once for both where encoder and connector are the same, as they are where both are frozen.
    """
    vision = model.encode(batch)
    output = model.hidden(batch, vision=vision)
    policy = token_log_probs(model, batch, hidden=output.hidden)
    other = None
    if reference is not None:
        shared = jax.lax.stop_gradient(vision) if sees_alike(model, reference) else None
        hidden = jax.lax.stop_gradient(reference.hidden(batch, vision=shared).hidden)
        other = jax.lax.stop_gradient(token_log_probs(reference, batch, hidden=hidden))
    return TokenLogProbs(policy, other, output.aux)


def reference_of(kind: Reference, model: VLM, copy: VLM | None) -> VLM | None:
    """Return the reference of a model: its frozen copy, or the model without its adapters; None of one in a file."""
    return detach(model) if kind == "adapter_off" else copy


def sees_alike(model: VLM, other: VLM) -> bool:
    """Return whether encoder and connector of two models hold the very same arrays."""
    for name in ("encoder", "connector"):
        one, two = (jax.tree.leaves(nnx.state(getattr(m, name))) for m in (model, other))
        if len(one) != len(two) or any(a is not b for a, b in zip(one, two, strict=True)):
            return False
    return True


def room(seq_len: int) -> int:
    """Return how many segments a sequence may have: one with an answer has two tokens at least. Even."""
    return max(seq_len // 4 * 2, 2)


def by_segment(values: Float[Array, "B S"], batch: PackedBatch) -> Float[Array, "B N"]:
    """Return the sum of each segment of each sequence; 0 for segments that are not there."""
    segments, count = jnp.asarray(batch.segment_ids), room(batch.tokens.shape[1]) + 1
    sums = jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, count, indices_are_sorted=False))(values, segments)
    return sums[:, 1:]


def answer_mask(batch: PackedBatch) -> Float[Array, "B S"]:
    """Return 1 where a token of an answer is predicted, else 0."""
    return (next_tokens(batch)[1] > 0).astype(jnp.float32)


def answer_token_number(mask: Float[Array, "B S"], batch: PackedBatch) -> Float[Array, "B S"]:
    """Return for each token of an answer its number in it, from 1."""
    tokens = by_segment(mask, batch)
    before = jnp.pad(jnp.cumsum(tokens, 1), ((0, 0), (1, 0)))[:, :-1]
    return jnp.cumsum(mask, 1) - at_segments(before, batch)


def at_segments(values: Float[Array, "B N"], batch: PackedBatch) -> Float[Array, "B S"]:
    """Return for each token the value of its segment; 0 for padding."""
    segments: Int[Array, "B S"] = jnp.asarray(batch.segment_ids)
    return jnp.take_along_axis(jnp.pad(values, ((0, 0), (1, 0))), segments, 1)

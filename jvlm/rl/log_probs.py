"""Log-probabilities of sampled tokens in packed sequences, in the distribution that the engine drew them from.

The same banned tokens, the same temperature, the same arithmetic in the same order.

Axes: B sequences, S tokens, V vocabulary, K banned ids that there is room for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jvlm.errors import UserError
from jvlm.inference.sampling import gumbel_noise
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.training.supervised import next_tokens

MOST_BANNED = 2048


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """What decides the random numbers that a token was drawn with, where it is predicted.

    Attributes:
      seeds: of the run.
      numbers: of the answers.
      steps: number of the token in its answer.
    """

    seeds: UInt[Array | np.ndarray, "*A B S"]
    numbers: Int[Array | np.ndarray, "*A B S"]
    steps: Int[Array | np.ndarray, "*A B S"]


def banned_ids(flags: Bool[np.ndarray, "2 V"]) -> Int[np.ndarray, "2 K"]:
    """Return the ids of tokens that are never given, and of those that are not given first, filled up with -1.

    Raises:
      UserError: more than there is room for.
    """
    result = np.full((2, MOST_BANNED), -1, np.int32)
    for row, own in enumerate(flags):
        ids = np.flatnonzero(own)
        if len(ids) > MOST_BANNED:
            raise UserError(
                f"{len(ids)} ids of the vocabulary of {len(own)} may not be given, and {MOST_BANNED} are the most "
                "here: take a model whose table is nearer to the size of its tokenizer"
            )
        result[row, : len(ids)] = ids
    return result


def banned_flags(ids: Int[Array, "B 2 K"], vocabulary: int) -> Bool[Array, "B 2 V"]:
    """Return the flags of `banned_ids`, for each sequence."""
    inside = jnp.where(ids < 0, vocabulary, ids)  # beyond the table: dropped

    def one(own: Int[Array, " K"]) -> Bool[Array, " V"]:
        return jnp.zeros(vocabulary, bool).at[own].set(True, mode="drop")

    return jax.vmap(jax.vmap(one))(inside)


def sampled_log_probs(
    model: VLM,
    batch: PackedBatch,
    hidden: Float[Array, "B S D"],
    banned: Int[Array, "B 2 K"],
    is_first: Bool[Array, "B S"],
    temperature: float,
    block: int = 256,
) -> Float[Array, "B S"]:
    """Return the log-probability of the token after each position, float32; 0 where none was sampled.

    Logits of ``block`` positions exist at a time, and are computed again for the gradient; blocks without a sampled
    token have none.

    Args:
      hidden: last hidden states.
      banned: of `banned_ids`, for each sequence.
      is_first: whether the token after a position is the first of its answer.
    """
    targets, weights = next_tokens(batch)

    def of_block(hidden_BTD: Array, targets_BT: Array, first_BT: Array, flags: Array) -> Array:
        values = jax.nn.log_softmax(_logits(model, hidden_BTD, first_BT, flags, temperature), axis=-1)
        return jnp.take_along_axis(values, targets_BT[..., None], -1)[..., 0]

    return _by_block(model, of_block, (hidden, targets, jnp.asarray(is_first)), weights, banned, block)


def drawn_tokens(
    model: VLM,
    batch: PackedBatch,
    hidden: Float[Array, "B S D"],
    banned: Int[Array, "B 2 K"],
    is_first: Bool[Array, "B S"],
    temperature: float,
    draws: Draws,
    block: int = 256,
) -> Int[Array, "B S"]:
    """Return the token after each position that these hidden states give with the random numbers of the engine; 0 where
    none was sampled. Arguments as of `sampled_log_probs`."""
    _, weights = next_tokens(batch)
    draws = jax.tree.map(jnp.asarray, draws)

    def of_block(hidden_BTD: Array, first_BT: Array, draws_BT: Draws, flags: Array) -> Array:
        values = _logits(model, hidden_BTD, first_BT, flags, temperature)
        rows = (x.reshape(-1) for x in (draws_BT.seeds, draws_BT.numbers, draws_BT.steps))
        noise = gumbel_noise(*rows, values.shape[-1])
        return jnp.argmax(values + noise.reshape(values.shape), axis=-1).astype(jnp.int32)

    return _by_block(model, of_block, (hidden, jnp.asarray(is_first), draws), weights, banned, block)


def _logits(model: VLM, hidden_BTD: Array, first_BT: Array, flags: Array, temperature: float) -> Array:
    """Return the logits [B, T, V] whose softmax is drawn from."""
    logits = model.decoder.logits(hidden_BTD).astype(jnp.float32)
    out = jnp.where(first_BT[..., None], flags[:, 1, None], flags[:, 0, None])
    return jnp.where(out, -jnp.inf, logits) / temperature


def _by_block(
    model: VLM,
    of_block: Callable[..., Array],
    inputs: tuple[Any, ...],
    weights: Float[Array, "B S"],
    banned: Int[Array, "B 2 K"],
    block: int,
) -> Array:
    """Return what ``of_block(*inputs of T positions, banned flags)`` gives for all positions with a weight, else 0."""
    B, S = weights.shape
    block = min(block, S)
    count = -(-S // block)
    flags = banned_flags(banned, model.config.decoder.vocab_size)

    def blocks(x: Array) -> Array:
        padding = ((0, 0), (0, count * block - S)) + ((0, 0),) * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, padding).reshape(B, count, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_weighted(own: tuple[Any, ...], weights_BT: Array) -> Array:
        shape = jax.eval_shape(of_block, *own, flags)
        nothing = lambda *_: jnp.zeros(shape.shape, shape.dtype)  # noqa: E731
        values = jax.lax.cond((weights_BT > 0).any(), of_block, nothing, *own, flags)
        return jnp.where(weights_BT > 0, values, 0)

    xs = (jax.tree.map(blocks, inputs), blocks(weights))
    _, by_block = jax.lax.scan(lambda _, own: (None, of_weighted(*own)), None, xs)
    return jnp.moveaxis(by_block, 0, 1).reshape(B, count * block)[:, :S]

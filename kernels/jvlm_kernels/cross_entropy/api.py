"""Cross-entropy of hidden states against a vocabulary matrix, without the logits of all tokens in memory.

Shapes: N tokens, D hidden size, V vocabulary size (of this shard, where it is split).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jvlm_kernels.cross_entropy import per_token, summed

IGNORE_INDEX = -100
Kernel = Float[Array, "D V"] | Float[Array, "V D"]
# Blocks of the vocabulary: logits in memory at a time, and limits of the block. A narrower product would not fill the
# device; at the widest, little is read and written besides the logits.
_MAX_LOGITS, _VOCABULARY_BLOCK = 1 << 26, (1024, 8192)
# Limits of a block of tokens. Half the hidden size makes the logits half as large as the kernel's gradient in float32,
# to which each block adds; the wider the block, the fewer such additions.
_TOKEN_BLOCK = 512, 4096


class CrossEntropy(NamedTuple):
    """Results for each token; 0 and False for tokens without a target.

    Attributes:
      loss: weighted loss in nats, z-loss included. Differentiable.
      logsumexp: of the token's logits. Differentiable. The log-probability of the target is ``-loss`` at weight 1 and
        without z-loss.
      correct: whether the target is the most likely vocabulary entry.
    """

    loss: Float[Array, " N"]
    logsumexp: Float[Array, " N"]
    correct: Bool[Array, " N"]


class CrossEntropySum(NamedTuple):
    """Sums over the supervised tokens.

    Attributes:
      loss: sum of the weighted losses in nats, z-loss included. Differentiable.
      correct: number of tokens whose target is the most likely vocabulary entry.
      by_group: the two sums of each group of tokens; None where no groups were given.
    """

    loss: Float[Array, ""]
    correct: Int[Array, ""]
    by_group: Float[Array, "G 2"] | None = None


def linear_cross_entropy(
    hidden: Float[Array, "N D"],
    kernel: Kernel,
    targets: Int[Array, " N"],
    weights: Float[Array, " N"] | None = None,
    *,
    vocabulary_first: bool = False,
    z_loss: float = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
    block: int | None = None,
) -> CrossEntropy:
    """Return the loss of each token, ``logsumexp(hidden @ kernel) - (hidden @ kernel)[target]``.

    Use it where each token's loss or log-probability counts by itself, as in preference and policy losses;
    `linear_cross_entropy_sum` is faster for a plain sum. Products are computed in the dtype of ``hidden`` and
    accumulated in float32; softmax and loss are float32. The gradient of the kernel has the dtype of the kernel and is
    accumulated in float32.

    Args:
      hidden: hidden states.
      kernel: the output projection, [D, V] or with ``vocabulary_first`` [V, D].
      targets: vocabulary index, or -100 for a token without a target.
      weights: factor of each token's loss, 0 for an unsupervised token; None is 1 for all.
      vocabulary_first: the kernel is [V, D], the layout of an embedding.
      z_loss: adds ``z_loss * logsumexp ** 2``, which keeps logits small (PaLM, arXiv 2204.02311).
      axis_name: mesh axis over which the vocabulary is split, in order, inside `jax.shard_map`. Targets are indices of
        the whole vocabulary; tokens and results are the same on every shard of the axis.
      block: vocabulary entries whose logits are in memory at a time; None chooses by memory.

    Raises:
      ValueError: shapes that do not fit together.
    """
    V, weights = _check(hidden, kernel, targets, weights, vocabulary_first, block)
    if block is None:
        block = _clip(1 << ((_MAX_LOGITS // max(len(hidden), 1)).bit_length() - 1), _VOCABULARY_BLOCK)
    spec = per_token.Spec(min(block, V), V, vocabulary_first, float(z_loss), axis_name)
    return CrossEntropy(*per_token.per_token_loss(spec, hidden, kernel, targets, weights))


def linear_cross_entropy_sum(
    hidden: Float[Array, "N D"],
    kernel: Kernel,
    targets: Int[Array, " N"],
    weights: Float[Array, " N"] | None = None,
    *,
    vocabulary_first: bool = False,
    z_loss: float = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
    block: int | None = None,
    groups: Int[Array, " N"] | None = None,
    num_groups: int = 0,
) -> CrossEntropySum:
    """Return ``linear_cross_entropy(...).loss.sum()``, in three quarters of its time or less.

    The gradients are computed with the loss, and only for supervised tokens (of weight other than 0), so the time is
    proportional to their number. Compiled, a frozen kernel costs no gradient.

    Args and errors are those of `linear_cross_entropy`, except
      block: tokens whose logits are in memory at a time; None chooses by memory.
      groups: a number for each token, from 0 to ``num_groups``; tokens with another number are in no group.
    """
    _, weights = _check(hidden, kernel, targets, weights, vocabulary_first, block)
    N, D = hidden.shape
    if block is None:
        blocks = -(-N // _clip(D // 2, _TOKEN_BLOCK))
        block = -(-N // max(blocks, 1) // 128) * 128  # of equal length, in whole tiles
    block = max(1, min(block, N))
    spec = summed.Spec(block, vocabulary_first, float(z_loss), axis_name, num_groups)
    return CrossEntropySum(*summed.summed_loss(spec, hidden, kernel, targets, weights, groups))


def _check(
    hidden, kernel, targets, weights, vocabulary_first: bool, block: int | None
) -> tuple[int, Float[Array, " N"]]:
    """Return (V, weights with 0 for tokens without a target); raise ValueError for shapes that do not fit."""
    N, D = hidden.shape
    V, width = kernel.shape if vocabulary_first else kernel.shape[::-1]
    if width != D:
        raise ValueError(f"hidden {hidden.shape} and kernel {kernel.shape} do not fit together")
    if targets.shape != (N,) or (weights is not None and weights.shape != (N,)):
        raise ValueError(f"targets {targets.shape} and weights do not fit {N} tokens")
    if block is not None and block < 1:
        raise ValueError(f"block must be positive, got {block}")
    weights = jnp.ones(N, jnp.float32) if weights is None else weights.astype(jnp.float32)
    return V, jnp.where(targets == IGNORE_INDEX, 0.0, weights)


def _clip(value: int, limits: tuple[int, int]) -> int:
    return min(max(value, limits[0]), limits[1])

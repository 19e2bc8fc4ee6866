"""Cross-entropy of hidden states against a vocabulary matrix, without the logits of all tokens and words in memory.

Shapes: N tokens, D hidden size, V vocabulary (of this shard, where it is split).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jvlm_kernels.cross_entropy import over_tokens, over_vocabulary

IGNORED = -100
Kernel = Float[Array, "D V"] | Float[Array, "V D"]
# A walk over words: logits that exist at a time, and the blocks that are worth it. A narrower product would not fill
# the device; at the widest, what is read and written besides the logits is little.
_LOGITS, _WORDS = 1 << 26, (1024, 8192)
# A walk over tokens. Half the hidden size makes the logits half as large as the kernel's gradient in float32, to
# which each block adds; the wider, the less often.
_TOKENS = 512, 4096


class CrossEntropy(NamedTuple):
    """Of each token; 0 and False where it is not learnt.

    Attributes:
      loss: weighted loss in nats, z-loss included. Differentiable, as is the next.
      logsumexp: of the token's logits. The log-probability of its target is ``-loss`` at weight 1 and no z-loss.
      correct: whether the target is the most likely word.
    """

    loss: Float[Array, " N"]
    logsumexp: Float[Array, " N"]
    correct: Bool[Array, " N"]


class CrossEntropySum(NamedTuple):
    """Of all tokens that are learnt.

    Attributes:
      loss: sum of the weighted losses in nats, z-loss included. Differentiable.
      correct: how many have a target that is the most likely word.
    """

    loss: Float[Array, ""]
    correct: Int[Array, ""]


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
    """Loss of each token against its target word, ``logsumexp(hidden @ kernel) - (hidden @ kernel)[target]``.

    Products are in the dtype of ``hidden`` and summed in float32; softmax and loss are float32. The gradient of the
    kernel comes in the kernel's own dtype, summed in float32.

    Args:
      targets: a word's number, or -100 for a token that is not learnt.
      weights: factor of each token's loss, 0 for one that is not learnt; None is 1.
      vocabulary_first: the kernel is [V, D], as an embedding is.
      z_loss: adds ``z_loss * logsumexp ** 2``, which keeps logits small (PaLM, arXiv 2204.02311).
      axis_name: mesh axis over which the vocabulary is split, in order, inside `jax.shard_map`. Targets number the
        whole vocabulary; tokens and results are the same on every shard of the axis.
      block: words whose logits exist at a time; None chooses by memory.

    Raises:
      ValueError: shapes that do not fit together.
    """
    V, weights = _checked(hidden, kernel, targets, weights, vocabulary_first, block)
    if block is None:
        block = _clip(1 << ((_LOGITS // max(len(hidden), 1)).bit_length() - 1), _WORDS)
    spec = over_vocabulary.Spec(min(block, V), V, vocabulary_first, float(z_loss), axis_name)
    return CrossEntropy(*over_vocabulary.each(spec, hidden, kernel, targets, weights))


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
) -> CrossEntropySum:
    """``linear_cross_entropy(...).loss.sum()``, in three quarters of its time or less.

    The gradients are computed with the loss, and only tokens that are learnt are computed at all, whichever they are:
    the fewer, the cheaper. Compiled, a kernel that is not learnt, a frozen head's, costs no gradient.

    Args and errors are those of `linear_cross_entropy`, but
      block: tokens whose logits exist at a time; None chooses by memory.
    """
    _, weights = _checked(hidden, kernel, targets, weights, vocabulary_first, block)
    N, D = hidden.shape
    if block is None:
        blocks = -(-N // _clip(D // 2, _TOKENS))
        block = -(-N // max(blocks, 1) // 128) * 128  # of equal length, in whole tiles
    block = max(1, min(block, N))
    spec = over_tokens.Spec(block, vocabulary_first, float(z_loss), axis_name)
    return CrossEntropySum(*over_tokens.summed(spec, hidden, kernel, targets, weights))


def _checked(
    hidden, kernel, targets, weights, vocabulary_first: bool, block: int | None
) -> tuple[int, Float[Array, " N"]]:
    """(words of the kernel, weights: 0 where a token is not learnt)."""
    N, D = hidden.shape
    V, own = kernel.shape if vocabulary_first else kernel.shape[::-1]
    if own != D:
        raise ValueError(f"hidden {hidden.shape} and kernel {kernel.shape} do not fit together")
    if targets.shape != (N,) or (weights is not None and weights.shape != (N,)):
        raise ValueError(f"targets {targets.shape} and weights do not fit {N} tokens")
    if block is not None and block < 1:
        raise ValueError(f"block must be positive, got {block}")
    weights = jnp.ones(N, jnp.float32) if weights is None else weights.astype(jnp.float32)
    return V, jnp.where(targets == IGNORED, 0.0, weights)


def _clip(value: int, limits: tuple[int, int]) -> int:
    return min(max(value, limits[0]), limits[1])

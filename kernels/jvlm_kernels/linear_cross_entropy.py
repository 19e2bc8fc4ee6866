"""Cross-entropy of hidden states against a vocabulary matrix, without the logits of all tokens and words in memory.

The vocabulary is walked in blocks: the forward pass keeps a running logsumexp, the backward pass computes each block's
logits again and leaves its part of the matrix's gradient finished, so no [N, V] array ever exists (as in Liger's fused
linear cross-entropy, arXiv 2410.10989, which cuts tokens instead and adds up the whole matrix's gradient each time).

Shapes: N tokens, D hidden size, V vocabulary (of this shard, where it is split), C words of a block.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

IGNORED = -100
# Logits that exist at a time, and the smallest block: a narrower matrix product would not fill the device.
_LOGITS, _SMALLEST = 1 << 24, 1024


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


@dataclasses.dataclass(frozen=True)
class _Spec:
    block: int
    vocabulary: int
    vocabulary_first: bool
    z_loss: float
    axis_name: str | None

    @property
    def count(self) -> int:
        return -(-self.vocabulary // self.block)


def linear_cross_entropy(
    hidden: Float[Array, "N D"],
    kernel: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"] | None = None,
    *,
    vocabulary_first: bool = False,
    z_loss: float = 0.0,
    axis_name: str | None = None,
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
    N, D = hidden.shape
    V, own = kernel.shape if vocabulary_first else kernel.shape[::-1]
    if own != D:
        raise ValueError(f"hidden {hidden.shape} and kernel {kernel.shape} do not fit together")
    if targets.shape != (N,) or (weights is not None and weights.shape != (N,)):
        raise ValueError(f"targets {targets.shape} and weights do not fit {N} tokens")
    if block is not None and block < 1:
        raise ValueError(f"block must be positive, got {block}")
    if block is None:
        block = max(_SMALLEST, 1 << (max(_LOGITS // max(N, 1), 1).bit_length() - 1))
    weights = jnp.ones(N, jnp.float32) if weights is None else weights.astype(jnp.float32)
    weights = jnp.where(targets == IGNORED, 0.0, weights)
    spec = _Spec(min(block, V), V, vocabulary_first, float(z_loss), axis_name)
    return CrossEntropy(*_cross_entropy(spec, hidden, kernel, targets, weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(spec: _Spec, hidden, kernel, targets, weights):
    return _forward(spec, hidden, kernel, targets, weights)[0]


def _logits(spec: _Spec, hidden, kernel, number):
    """(logits [N, C] of a block, ids [C] of its words in this shard, which of them belong to it).

    The last block begins early where the vocabulary is no multiple; what it shares with the one before is not its own.
    """
    begin = jnp.minimum(number * spec.block, spec.vocabulary - spec.block)
    part = _slice(spec, kernel, begin).astype(hidden.dtype)
    logits = lax.dot_general(
        hidden, part, (((1,), (1 if spec.vocabulary_first else 0,)), ((), ())), preferred_element_type=jnp.float32
    )
    ids = begin + jnp.arange(spec.block)
    return logits, ids, ids >= number * spec.block


def _slice(spec: _Spec, kernel, begin):
    return lax.dynamic_slice_in_dim(kernel, begin, spec.block, 0 if spec.vocabulary_first else 1)


def _local(spec: _Spec, targets):
    """Numbers of the targets within this shard; out of range where they are another's."""
    return targets if spec.axis_name is None else targets - lax.axis_index(spec.axis_name) * spec.vocabulary


def _forward(spec: _Spec, hidden, kernel, targets, weights):
    local = _local(spec, targets)

    def step(carry, number):
        top, total, chosen, best = carry
        logits, ids, own = _logits(spec, hidden, kernel, number)
        shown = jnp.where(own, logits, -jnp.inf)
        highest = shown.max(-1)
        now = jnp.maximum(top, highest)
        total = total * jnp.exp(top - now) + jnp.exp(shown - now[:, None]).sum(-1)
        chosen = chosen + jnp.where((ids == local[:, None]) & own, logits, 0.0).sum(-1)
        return (now, total, chosen, jnp.where(highest > top, ids[0] + shown.argmax(-1), best)), logits

    zeros = _varying(spec, jnp.zeros(hidden.shape[0], jnp.float32) + 0 * hidden[:, 0].astype(jnp.float32))
    start = zeros - jnp.inf, zeros, zeros, zeros.astype(jnp.int32)
    if spec.count == 1:
        (top, total, chosen, best), logits = step(start, 0)
    else:
        logits = None
        (top, total, chosen, best), _ = lax.scan(lambda c, n: (step(c, n)[0], None), start, jnp.arange(spec.count))
    is_best = best == local
    if spec.axis_name is not None:
        own, top = top, lax.pmax(top, spec.axis_name)
        total = lax.psum(total * jnp.exp(own - top), spec.axis_name)
        chosen = lax.psum(chosen, spec.axis_name)
        is_best = lax.psum((is_best & (own == top)).astype(jnp.int32), spec.axis_name) > 0
    logsumexp = top + jnp.log(total)
    learnt = weights != 0
    loss = jnp.where(learnt, weights * (logsumexp - chosen + spec.z_loss * logsumexp**2), 0.0)
    outputs = loss, jnp.where(learnt, logsumexp, 0.0), learnt & is_best
    return outputs, (hidden, kernel, targets, weights, logsumexp, chosen, logits)


def _varying(spec: _Spec, x):
    """Marks a loop's first value as differing from shard to shard, as the later ones do."""
    return x if spec.axis_name is None else x + 0 * lax.axis_index(spec.axis_name)


def _backward(spec: _Spec, saved, cotangents):
    hidden, kernel, targets, weights, logsumexp, chosen, logits = saved
    d_loss, d_logsumexp, _ = cotangents
    learnt, local = weights != 0, _local(spec, targets)
    of_chosen = jnp.where(learnt, d_loss * weights, 0.0)
    of_total = of_chosen * (1 + 2 * spec.z_loss * logsumexp) + jnp.where(learnt, d_logsumexp, 0.0)
    d_weights = jnp.where(learnt, d_loss * (logsumexp - chosen + spec.z_loss * logsumexp**2), 0.0)

    def step(carry, number):
        d_hidden, d_kernel = carry
        block, ids, own = (logits, *_ids(spec)) if logits is not None else _logits(spec, hidden, kernel, number)
        d_logits = jnp.exp(block - logsumexp[:, None]) * of_total[:, None]
        d_logits = jnp.where(ids == local[:, None], d_logits - of_chosen[:, None], d_logits)
        d_logits = jnp.where(own, d_logits, 0.0).astype(hidden.dtype)
        part = _slice(spec, kernel, ids[0]).astype(hidden.dtype)
        product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
        d_hidden += product(d_logits, part, (((1,), (0 if spec.vocabulary_first else 1,)), ((), ())))
        pair = (d_logits, hidden) if spec.vocabulary_first else (hidden, d_logits)
        more = product(*pair, (((0,), (0,)), ((), ())))
        axis = 0 if spec.vocabulary_first else 1
        more = (_slice(spec, d_kernel, ids[0]).astype(jnp.float32) + more).astype(d_kernel.dtype)
        return (d_hidden, lax.dynamic_update_slice_in_dim(d_kernel, more, ids[0], axis)), None

    start = _varying(spec, jnp.zeros(hidden.shape, jnp.float32) + 0 * hidden), 0 * kernel
    if spec.count == 1:
        (d_hidden, d_kernel), _ = step(start, 0)
    else:
        (d_hidden, d_kernel), _ = lax.scan(step, start, jnp.arange(spec.count))
    if spec.axis_name is not None:
        d_hidden = lax.psum(d_hidden, spec.axis_name)
    return d_hidden.astype(hidden.dtype), d_kernel, None, d_weights


def _ids(spec: _Spec):
    """Of the only block."""
    return jnp.arange(spec.block), jnp.ones(spec.block, bool)


_cross_entropy.defvjp(_forward, _backward)

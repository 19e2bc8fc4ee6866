"""The loss of each token in a loop over blocks of the vocabulary; differentiable for any use of it.

The forward pass keeps a running logsumexp. The backward pass computes the logits of each block again and finishes the
block's slice of the kernel's gradient.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static arguments of a call.

    Attributes:
      block: vocabulary entries of a block.
      vocabulary: vocabulary entries of the kernel.
      vocabulary_first, z_loss, axis_name: as in `jvlm_kernels.linear_cross_entropy`.
    """

    block: int
    vocabulary: int
    vocabulary_first: bool
    z_loss: float
    axis_name: str | tuple[str, ...] | None

    @property
    def count(self) -> int:
        return -(-self.vocabulary // self.block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def per_token_loss(spec: Spec, hidden, kernel, targets, weights):
    """Return (loss, logsumexp, correct) of each token."""
    return _forward(spec, hidden, kernel, targets, weights)[0]


def _logits(spec: Spec, hidden, kernel, number):
    """Return (logits [N, C] of a block, vocabulary indices [C] within this shard, whether each is new [C]).

    Where the vocabulary is no multiple of the block, the last block starts early and overlaps the one before; the
    overlap is not new.
    """
    begin = jnp.minimum(number * spec.block, spec.vocabulary - spec.block)
    block = _slice(spec, kernel, begin).astype(hidden.dtype)
    logits = lax.dot_general(
        hidden, block, (((1,), (1 if spec.vocabulary_first else 0,)), ((), ())), preferred_element_type=jnp.float32
    )
    ids = begin + jnp.arange(spec.block)
    return logits, ids, ids >= number * spec.block


def _slice(spec: Spec, kernel, begin):
    return lax.dynamic_slice_in_dim(kernel, begin, spec.block, 0 if spec.vocabulary_first else 1)


def _local(spec: Spec, targets):
    """Return the targets as indices within this shard; out of range for entries of other shards."""
    return targets if spec.axis_name is None else targets - lax.axis_index(spec.axis_name) * spec.vocabulary


def _forward(spec: Spec, hidden, kernel, targets, weights):
    local = _local(spec, targets)

    def step(carry, number):
        running_max, total, target_logit, argmax = carry
        logits, ids, is_new = _logits(spec, hidden, kernel, number)
        new_logits = jnp.where(is_new, logits, -jnp.inf)
        block_max = new_logits.max(-1)
        new_max = jnp.maximum(running_max, block_max)
        total = total * jnp.exp(running_max - new_max) + jnp.exp(new_logits - new_max[:, None]).sum(-1)
        target_logit = target_logit + jnp.where((ids == local[:, None]) & is_new, logits, 0.0).sum(-1)
        return (
            new_max,
            total,
            target_logit,
            jnp.where(block_max > running_max, ids[0] + new_logits.argmax(-1), argmax),
        ), logits

    zeros = _varying(spec, jnp.zeros(hidden.shape[0], jnp.float32) + 0 * hidden[:, 0].astype(jnp.float32))
    start = zeros - jnp.inf, zeros, zeros, zeros.astype(jnp.int32)
    if spec.count == 1:
        (running_max, total, target_logit, argmax), logits = step(start, 0)
    else:
        logits = None
        (running_max, total, target_logit, argmax), _ = lax.scan(
            lambda c, n: (step(c, n)[0], None), start, jnp.arange(spec.count)
        )
    is_argmax = argmax == local
    if spec.axis_name is not None:
        shard_max, running_max = running_max, lax.pmax(running_max, spec.axis_name)
        total = lax.psum(total * jnp.exp(shard_max - running_max), spec.axis_name)
        target_logit = lax.psum(target_logit, spec.axis_name)
        is_argmax = lax.psum((is_argmax & (shard_max == running_max)).astype(jnp.int32), spec.axis_name) > 0
    logsumexp = running_max + jnp.log(total)
    supervised = weights != 0
    loss = jnp.where(supervised, weights * (logsumexp - target_logit + spec.z_loss * logsumexp**2), 0.0)
    outputs = loss, jnp.where(supervised, logsumexp, 0.0), supervised & is_argmax
    return outputs, (hidden, kernel, targets, weights, logsumexp, target_logit, logits)


def _varying(spec: Spec, x):
    """Mark a loop's first carry as varying from shard to shard, as the later ones do."""
    return x if spec.axis_name is None else x + 0 * lax.axis_index(spec.axis_name)


def _backward(spec: Spec, residuals, cotangents):
    hidden, kernel, targets, weights, logsumexp, target_logit, logits = residuals
    d_loss, d_logsumexp, _ = cotangents
    supervised, local = weights != 0, _local(spec, targets)
    d_target = jnp.where(supervised, d_loss * weights, 0.0)
    d_logsumexp_total = d_target * (1 + 2 * spec.z_loss * logsumexp) + jnp.where(supervised, d_logsumexp, 0.0)
    d_weights = jnp.where(supervised, d_loss * (logsumexp - target_logit + spec.z_loss * logsumexp**2), 0.0)

    def step(carry, number):
        d_hidden, d_kernel = carry
        block, ids, is_new = (logits, *_ids(spec)) if logits is not None else _logits(spec, hidden, kernel, number)
        d_logits = jnp.exp(block - logsumexp[:, None]) * d_logsumexp_total[:, None]
        d_logits = jnp.where(ids == local[:, None], d_logits - d_target[:, None], d_logits)
        d_logits = jnp.where(is_new, d_logits, 0.0).astype(hidden.dtype)
        kernel_block = _slice(spec, kernel, ids[0]).astype(hidden.dtype)
        product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
        d_hidden += product(d_logits, kernel_block, (((1,), (0 if spec.vocabulary_first else 1,)), ((), ())))
        pair = (d_logits, hidden) if spec.vocabulary_first else (hidden, d_logits)
        d_block = product(*pair, (((0,), (0,)), ((), ())))
        axis = 0 if spec.vocabulary_first else 1
        d_block = (_slice(spec, d_kernel, ids[0]).astype(jnp.float32) + d_block).astype(d_kernel.dtype)
        return (d_hidden, lax.dynamic_update_slice_in_dim(d_kernel, d_block, ids[0], axis)), None

    start = _varying(spec, jnp.zeros(hidden.shape, jnp.float32) + 0 * hidden), 0 * kernel
    if spec.count == 1:
        (d_hidden, d_kernel), _ = step(start, 0)
    else:
        (d_hidden, d_kernel), _ = lax.scan(step, start, jnp.arange(spec.count))
    if spec.axis_name is not None:
        d_hidden = lax.psum(d_hidden, spec.axis_name)
    return d_hidden.astype(hidden.dtype), d_kernel, None, d_weights


def _ids(spec: Spec):
    """Return what `_logits` returns besides the logits, for a single block."""
    return jnp.arange(spec.block), jnp.ones(spec.block, bool)


per_token_loss.defvjp(_forward, _backward)

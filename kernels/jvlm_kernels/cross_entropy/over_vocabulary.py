"""The loss of each token in a walk over the vocabulary, a block of words at a time; differentiable for any use of it.

The forward pass keeps a running logsumexp, the backward pass computes each block's logits again and leaves its part of
the kernel's gradient finished.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known when the call is traced; ``block`` and ``vocabulary`` are in words."""

    block: int
    vocabulary: int
    vocabulary_first: bool
    z_loss: float
    axis_name: str | tuple[str, ...] | None

    @property
    def count(self) -> int:
        return -(-self.vocabulary // self.block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def each(spec: Spec, hidden, kernel, targets, weights):
    """(loss, logsumexp, correct) of each token."""
    return _forward(spec, hidden, kernel, targets, weights)[0]


def _logits(spec: Spec, hidden, kernel, number):
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


def _slice(spec: Spec, kernel, begin):
    return lax.dynamic_slice_in_dim(kernel, begin, spec.block, 0 if spec.vocabulary_first else 1)


def _local(spec: Spec, targets):
    """Numbers of the targets within this shard; out of range where they are another's."""
    return targets if spec.axis_name is None else targets - lax.axis_index(spec.axis_name) * spec.vocabulary


def _forward(spec: Spec, hidden, kernel, targets, weights):
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


def _varying(spec: Spec, x):
    """Marks a loop's first value as differing from shard to shard, as the later ones do."""
    return x if spec.axis_name is None else x + 0 * lax.axis_index(spec.axis_name)


def _backward(spec: Spec, saved, cotangents):
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


def _ids(spec: Spec):
    """Of the only block."""
    return jnp.arange(spec.block), jnp.ones(spec.block, bool)


each.defvjp(_forward, _backward)

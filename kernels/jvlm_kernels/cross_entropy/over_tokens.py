"""The summed loss and its gradients in one walk over the tokens that are learnt, a block of them at a time.

The logits of a block are there for all words, so that its gradients follow at once and nothing is computed twice: three
products of the size of the logits, where walking the vocabulary takes four. That the loss is summed makes it possible:
what the backward pass brings is one number, by which it scales the gradients. Liger's fused linear cross-entropy
(arXiv 2410.10989) does so too, over all tokens. Tokens that are not learnt, such as those of images, cost nothing here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jvlm_kernels.shapes import mesh_axes, over_axes


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known when the call is traced; ``block`` is in tokens."""

    block: int
    vocabulary_first: bool
    z_loss: float
    axis_name: str | tuple[str, ...] | None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name or ()


class _Sums(NamedTuple):
    """Of the tokens walked so far. Gradients are for a cotangent of 1, and None where only the loss is asked for.

    Those of hidden states and weights lie in the order of the walk, the kernel's is float32.
    """

    loss: jax.Array
    correct: jax.Array
    d_hidden: jax.Array | None = None
    d_kernel: jax.Array | None = None
    d_weights: jax.Array | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed(spec: Spec, hidden, kernel, targets, weights):
    """(loss, correct), sums over the tokens of weight other than 0. Nothing else is differentiable but the loss."""
    return _walk(spec, hidden, kernel, targets, weights, differentiated=False)[0]


def _forward(spec: Spec, hidden, kernel, targets, weights):
    # XLA leaves out the gradients of which nothing comes, such as a frozen kernel's
    return _walk(spec, hidden, kernel, targets, weights, differentiated=True)


def _backward(spec: Spec, gradients, cotangents):
    d_hidden, d_kernel, d_weights = ((cotangents[0] * g).astype(g.dtype) for g in gradients)
    return d_hidden, d_kernel, None, d_weights


summed.defvjp(_forward, _backward)


def _walk(spec: Spec, hidden, kernel, targets, weights, *, differentiated: bool):
    """((loss, correct), gradients of hidden, kernel and weights): the learnt tokens, however few there are."""
    N, learnt = len(weights), weights != 0
    # the learnt ones first; what fills their last block up is nothing but zeros
    order = jnp.argsort(~learnt, stable=True)
    filled = jnp.pad(order, (0, -N % spec.block))
    shares = jnp.where(jnp.arange(len(filled)) < N, weights[filled], 0.0)
    tokens = jnp.where(shares[:, None] != 0, hidden[filled], 0), targets[filled], shares
    blocks = -(-learnt.sum() // spec.block)
    if spec.names and mesh_axes(blocks):  # devices meet in each block, so all take as many
        blocks = lax.pmax(blocks, mesh_axes(blocks))

    def step(number, sums: _Sums) -> _Sums:
        begin = number * spec.block
        own = (lax.dynamic_slice_in_dim(x, begin, spec.block) for x in tokens)
        new = _block(spec, *own, matrix, differentiated)
        loss, correct = sums.loss + new.loss, sums.correct + new.correct
        if not differentiated:
            return _Sums(loss, correct)
        d_hidden = lax.dynamic_update_slice_in_dim(sums.d_hidden, new.d_hidden, begin, 0)
        d_weights = lax.dynamic_update_slice_in_dim(sums.d_weights, new.d_weights, begin, 0)
        return _Sums(loss, correct, d_hidden, sums.d_kernel + new.d_kernel, d_weights)

    matrix = kernel.astype(hidden.dtype)
    axes = mesh_axes(hidden, kernel, targets, weights)
    shared = tuple(a for a in axes if a not in spec.names)

    def zeros(shape, dtype, axes=shared):
        return over_axes(jnp.zeros(shape, dtype), axes)

    start = _Sums(zeros((), jnp.float32), zeros((), jnp.int32))
    if differentiated:
        d_kernel = zeros(kernel.shape, jnp.float32, axes)
        start = _Sums(*start[:2], zeros(tokens[0].shape, hidden.dtype), d_kernel, zeros(shares.shape, jnp.float32))
    # how often at most is nowhere else in the compiled program; jvlm/planning/hlo.py reads it
    with jax.named_scope(f"at_most_{len(filled) // spec.block}_times"):
        sums = lax.fori_loop(0, blocks, step, start)
    if not differentiated:
        return (sums.loss, sums.correct), None
    back = jnp.zeros(N, jnp.int32).at[order].set(jnp.arange(N), unique_indices=True)
    return (sums.loss, sums.correct), (sums.d_hidden[back], sums.d_kernel.astype(kernel.dtype), sums.d_weights[back])


def _block(spec: Spec, hidden, targets, weights, matrix, differentiated: bool) -> _Sums:
    """Of n tokens; their logits [n, V] exist here alone."""
    words, width = (0, 1) if spec.vocabulary_first else (1, 0)
    product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
    logits = product(hidden, matrix, (((1,), (width,)), ((), ())))
    local = targets - (lax.axis_index(spec.names) * matrix.shape[words] if spec.names else 0)
    ids, local = jnp.arange(matrix.shape[words]), local[:, None]
    learnt = weights != 0

    top = logits.max(-1)
    top = lax.pmax(top, spec.names) if spec.names else top
    total = jnp.exp(logits - top[:, None]).sum(-1)
    of_target = jnp.where(ids == local, logits, 0.0).sum(-1)
    total, of_target = lax.psum((total, of_target), spec.names) if spec.names else (total, of_target)
    # in the order of argmax, as one more sum of the same pass; a target that is not a number is behind all
    known = of_target[:, None]
    ahead = jnp.where((logits < known) | ((logits == known) & (ids >= local)), 0.0, 1.0).sum(-1)
    ahead = lax.psum(ahead, spec.names) if spec.names else ahead
    logsumexp = top + jnp.log(total)
    unweighted = jnp.where(learnt, logsumexp - of_target + spec.z_loss * logsumexp**2, 0.0)

    loss, correct = (weights * unweighted).sum(), (learnt & (ahead == 0)).sum(dtype=jnp.int32)
    if not differentiated:
        return _Sums(loss, correct)
    of_total = weights * (1 + 2 * spec.z_loss * logsumexp)
    d_logits = jnp.exp(logits - logsumexp[:, None]) * of_total[:, None]
    d_logits = (d_logits - jnp.where(ids == local, weights[:, None], 0.0)).astype(hidden.dtype)
    d_hidden = product(d_logits, matrix, (((1,), (words,)), ((), ())))
    d_hidden = lax.psum(d_hidden, spec.names) if spec.names else d_hidden
    # turned by itself: XLA for CPU else turns it within the product, which then takes twice as long
    turned = lax.optimization_barrier(hidden.T)
    if spec.vocabulary_first:
        d_kernel = product(d_logits, turned, (((0,), (1,)), ((), ())))
    else:
        d_kernel = product(turned, d_logits, (((1,), (0,)), ((), ())))
    return _Sums(loss, correct, d_hidden.astype(hidden.dtype), d_kernel, unweighted)

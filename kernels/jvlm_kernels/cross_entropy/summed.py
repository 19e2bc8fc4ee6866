"""The summed loss and its gradients in one loop over blocks of supervised tokens.

A block has the logits of the whole vocabulary, so its gradients follow at once and nothing is computed twice: three
matrix products of the size of the logits, where a loop over the vocabulary takes four. It is possible because the loss
is a sum: the backward pass receives one number and scales the gradients by it. Liger's fused linear cross-entropy
(arXiv 2410.10989) does the same over all tokens. Tokens without a loss, such as those of images, cost nothing here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jvlm_kernels.shapes import mark_varying, varying_axes


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static arguments of a call.

    Attributes:
      block: tokens of a block.
      vocabulary_first, z_loss, axis_name: as in `jvlm_kernels.linear_cross_entropy`.
      groups: number of groups whose sums are wanted.
    """

    block: int
    vocabulary_first: bool
    z_loss: float
    axis_name: str | tuple[str, ...] | None
    groups: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name or ()


class _Sums(NamedTuple):
    """Sums over the blocks computed so far.

    Gradients are for a cotangent of 1, and None where only the loss is needed. Those of hidden states and weights are
    in the order of the loop; that of the kernel is float32.
    """

    loss: jax.Array
    correct: jax.Array
    by_group: jax.Array | None = None
    d_hidden: jax.Array | None = None
    d_kernel: jax.Array | None = None
    d_weights: jax.Array | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_loss(spec: Spec, hidden, kernel, targets, weights, groups):
    """Return (loss, correct, by_group) of the tokens of weight other than 0. Only the loss is differentiable."""
    return _loop(spec, hidden, kernel, targets, weights, groups, differentiated=False)[0]


def _forward(spec: Spec, hidden, kernel, targets, weights, groups):
    # XLA removes gradients that nothing uses, such as a frozen kernel's
    return _loop(spec, hidden, kernel, targets, weights, groups, differentiated=True)


def _backward(spec: Spec, gradients, cotangents):
    d_hidden, d_kernel, d_weights = ((cotangents[0] * g).astype(g.dtype) for g in gradients)
    return d_hidden, d_kernel, None, d_weights, None


summed_loss.defvjp(_forward, _backward)


def _loop(spec: Spec, hidden, kernel, targets, weights, groups, *, differentiated: bool):
    """Return ((loss, correct, by_group), gradients of hidden, kernel and weights)."""
    N, supervised = len(weights), weights != 0
    # supervised tokens first; the last block is filled up with zeros
    order = jnp.argsort(~supervised, stable=True)
    filled = jnp.pad(order, (0, -N % spec.block))
    shares = jnp.where(jnp.arange(len(filled)) < N, weights[filled], 0.0)
    tokens = jnp.where(shares[:, None] != 0, hidden[filled], 0), targets[filled], shares
    tokens += () if groups is None else (groups[filled],)
    blocks = -(-supervised.sum() // spec.block)
    if spec.names and varying_axes(blocks):  # each block has collectives, so all devices need the same number
        blocks = lax.pmax(blocks, varying_axes(blocks))

    def step(number, sums: _Sums) -> _Sums:
        begin = number * spec.block
        block = (lax.dynamic_slice_in_dim(x, begin, spec.block) for x in tokens)
        hidden, targets, weights, *groups = block
        new = _block(spec, hidden, targets, weights, matrix, differentiated, *groups)
        totals = jax.tree.map(jnp.add, sums[:3], new[:3])
        if not differentiated:
            return _Sums(*totals)
        d_hidden = lax.dynamic_update_slice_in_dim(sums.d_hidden, new.d_hidden, begin, 0)
        d_weights = lax.dynamic_update_slice_in_dim(sums.d_weights, new.d_weights, begin, 0)
        return _Sums(*totals, d_hidden, sums.d_kernel + new.d_kernel, d_weights)

    matrix = kernel.astype(hidden.dtype)
    axes = varying_axes(hidden, kernel, targets, weights, *(() if groups is None else (groups,)))
    shared = tuple(a for a in axes if a not in spec.names)

    def zeros(shape, dtype, axes=shared):
        return mark_varying(jnp.zeros(shape, dtype), axes)

    by_group = None if groups is None else zeros((spec.groups, 2), jnp.float32)
    start = _Sums(zeros((), jnp.float32), zeros((), jnp.int32), by_group)
    if differentiated:
        d_kernel = zeros(kernel.shape, jnp.float32, axes)
        start = _Sums(*start[:3], zeros(tokens[0].shape, hidden.dtype), d_kernel, zeros(shares.shape, jnp.float32))
    # the planner's HLO reader takes the loop's upper bound from this name: the compiled program has it nowhere else
    with jax.named_scope(f"at_most_{len(filled) // spec.block}_times"):
        sums = lax.fori_loop(0, blocks, step, start)
    if not differentiated:
        return sums[:3], None
    inverse = jnp.zeros(N, jnp.int32).at[order].set(jnp.arange(N), unique_indices=True)
    return sums[:3], (
        sums.d_hidden[inverse],
        sums.d_kernel.astype(kernel.dtype),
        sums.d_weights[inverse],
    )


def _block(spec: Spec, hidden, targets, weights, matrix, differentiated: bool, groups=None) -> _Sums:
    """Return the sums of one block of n tokens; only here do logits [n, V] exist."""
    entries, width = (0, 1) if spec.vocabulary_first else (1, 0)
    product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
    logits = product(hidden, matrix, (((1,), (width,)), ((), ())))
    local = targets - (lax.axis_index(spec.names) * matrix.shape[entries] if spec.names else 0)
    ids, local = jnp.arange(matrix.shape[entries]), local[:, None]
    supervised = weights != 0

    maximum = logits.max(-1)
    maximum = lax.pmax(maximum, spec.names) if spec.names else maximum
    total = jnp.exp(logits - maximum[:, None]).sum(-1)
    of_target = jnp.where(ids == local, logits, 0.0).sum(-1)
    total, of_target = lax.psum((total, of_target), spec.names) if spec.names else (total, of_target)
    # counts the entries that argmax prefers to the target, in the same pass; a NaN target counts all as preferred
    known = of_target[:, None]
    ahead = jnp.where((logits < known) | ((logits == known) & (ids >= local)), 0.0, 1.0).sum(-1)
    ahead = lax.psum(ahead, spec.names) if spec.names else ahead
    logsumexp = maximum + jnp.log(total)
    unweighted = jnp.where(supervised, logsumexp - of_target + spec.z_loss * logsumexp**2, 0.0)

    losses, right = weights * unweighted, supervised & (ahead == 0)
    loss, correct, by_group = losses.sum(), right.sum(dtype=jnp.int32), None
    if groups is not None:
        member = groups[:, None] == jnp.arange(spec.groups)
        parts = (jnp.where(member, x[:, None], 0.0).sum(0) for x in (losses, right.astype(jnp.float32)))
        by_group = jnp.stack(tuple(parts), -1)
    if not differentiated:
        return _Sums(loss, correct, by_group)
    of_total = weights * (1 + 2 * spec.z_loss * logsumexp)
    d_logits = jnp.exp(logits - logsumexp[:, None]) * of_total[:, None]
    d_logits = (d_logits - jnp.where(ids == local, weights[:, None], 0.0)).astype(hidden.dtype)
    d_hidden = product(d_logits, matrix, (((1,), (entries,)), ((), ())))
    d_hidden = lax.psum(d_hidden, spec.names) if spec.names else d_hidden
    # transposed beforehand: XLA for CPU would transpose within the product, which then takes twice as long
    transposed = lax.optimization_barrier(hidden.T)
    if spec.vocabulary_first:
        d_kernel = product(d_logits, transposed, (((0,), (1,)), ((), ())))
    else:
        d_kernel = product(transposed, d_logits, (((1,), (0,)), ((), ())))
    return _Sums(loss, correct, by_group, d_hidden.astype(hidden.dtype), d_kernel, unweighted)

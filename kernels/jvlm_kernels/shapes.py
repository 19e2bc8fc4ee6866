"""Types of kernel results inside `jax.shard_map`: over which mesh axes an array varies."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def result_type(shape: Sequence[int], dtype, operands: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result, varying over every mesh axis that an operand varies over.

    `jax.shard_map` checks it; a kernel's own call does not know it.
    """

    def example(*operands):
        return jnp.broadcast_to(functools.reduce(operator.add, (x.ravel()[0].astype(dtype) for x in operands)), shape)

    return jax.eval_shape(example, *operands)


def initial_carry(values, operands: Sequence[jax.Array]):
    """Return a loop's first carry, a tree of arrays, marked as varying over the mesh axes of the operands."""
    # not 0 * x, which would propagate a NaN
    zero = functools.reduce(operator.add, (0 * jnp.isnan(x.ravel()[0]) for x in operands))
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), values)


def varying_axes(*operands: jax.Array) -> tuple[str, ...]:
    """Return the mesh axes over which at least one operand varies, inside `jax.shard_map`."""
    return tuple(frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands)))


def mark_varying(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Return ``x`` marked as varying over these mesh axes too.

    It moves no data. Its transpose sums the gradient over the axes that ``x`` did not vary over.
    """
    missing = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def mark_varying_like(values, operands: Sequence[jax.Array]):
    """Return a tree of results marked as varying over every mesh axis that an operand varies over."""
    axes = varying_axes(*operands)
    return jax.tree.map(lambda x: mark_varying(x, axes), values)

"""Shapes of kernel results."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def result(shape: Sequence[int], dtype, operands: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
    """What a kernel returns, varying over every mesh axis that an operand varies over, as `jax.shard_map` checks."""

    def example(*operands):
        return jnp.broadcast_to(functools.reduce(operator.add, (x.ravel()[0].astype(dtype) for x in operands)), shape)

    return jax.eval_shape(example, *operands)


def varying(values, operands: Sequence[jax.Array]):
    """A tree of arrays, a loop's first values, marked as varying over every mesh axis that an operand varies over."""
    # not 0 * x, which a NaN would pass on
    zero = functools.reduce(operator.add, (0 * jnp.isnan(x.ravel()[0]) for x in operands))
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), values)


def mesh_axes(*operands: jax.Array) -> tuple[str, ...]:
    """The mesh axes over which one of them varies, inside `jax.shard_map`."""
    return tuple(frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands)))


def over_axes(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Marked as varying over these mesh axes too. Moves no data; in a gradient, what did not vary is summed."""
    missing = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def marked_varying(values, operands: Sequence[jax.Array]):
    """A tree of results with the mark of `result`, where the kernel's own call has lost it. Moves no data."""
    axes = mesh_axes(*operands)
    return jax.tree.map(lambda x: over_axes(x, axes), values)

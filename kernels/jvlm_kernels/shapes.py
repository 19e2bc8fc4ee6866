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

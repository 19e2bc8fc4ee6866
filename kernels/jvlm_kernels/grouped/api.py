"""The product of rows, sorted by group, with a matrix for each group, and its gradient.

Shapes: N rows, E groups, D values of a row, F of a result.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jvlm_kernels.platforms import Operation
from jvlm_kernels.shapes import mesh_axes, over_axes


@dataclasses.dataclass(frozen=True)
class GroupedSpec:
    """The static part of a call. ``interpret``: run a Pallas kernel in the interpreter, on any device."""

    interpret: bool


# Each offers ``forward(spec, x, matrices, sizes) -> (y,)`` and ``backward(spec, x, matrices, sizes, d_y) -> (dx, dm)``.
_OPERATION = Operation(
    "grouped_product",
    {"pallas_gpu": "jvlm_kernels.grouped.gpu", "xla": "jvlm_kernels.grouped.xla"},
    rows=False,
)


def grouped_product(
    x: Float[Array, "N D"],
    matrices: Float[Array, "E D F"],
    sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "N F"]:
    """Each row times its group's matrix: the first ``sizes[0]`` rows times the first, and so on.

    Sums are float32. What rows behind the last group give is undefined, in the result and in its gradient by ``x``;
    they add nothing to that by ``matrices``.

    Args:
      implementation, interpret: as in `segment_attention`.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
      Unavailable: the implementation asked for cannot run this call; says why.
    """
    if matrices.shape[1] != x.shape[1] or sizes.shape != matrices.shape[:1]:
        raise ValueError(f"rows {x.shape}, matrices {matrices.shape} and sizes {sizes.shape} do not fit together")
    if matrices.dtype != x.dtype:
        raise ValueError(f"rows are {x.dtype}, matrices {matrices.dtype}")
    spec = GroupedSpec(interpret)
    names = _OPERATION.runnable(implementation, interpret, spec, x, matrices)
    operands = x, matrices, sizes.astype(jnp.int32)
    axes = mesh_axes(*operands)  # what varies over fewer has its gradient summed here, outside of the kernels
    return _product(spec, names, *(over_axes(a, axes) for a in operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec, names, x, matrices, sizes):
    return _OPERATION.run(spec, names, "forward", x, matrices, sizes)[0]


def _forward(spec, names, *inputs):
    return _product(spec, names, *inputs), inputs


def _backward(spec, names, inputs, d_y):
    return (*_OPERATION.run(spec, names, "backward", *inputs, d_y), None)


_product.defvjp(_forward, _backward)

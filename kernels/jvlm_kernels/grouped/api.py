"""`grouped_matmul`: rows sorted by group times one matrix for each group, and its gradient.

Shapes: N rows, E groups, D input features, F output features.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jvlm_kernels.platforms import Operation
from jvlm_kernels.shapes import mark_varying, varying_axes


@dataclasses.dataclass(frozen=True)
class GroupedSpec:
    """The static arguments of a call.

    Attributes:
      interpret: run a Pallas kernel in the interpreter, on any device.
    """

    interpret: bool


# Each module has ``forward(spec, x, matrices, sizes) -> (y,)`` and
# ``backward(spec, x, matrices, sizes, d_y) -> (dx, d_matrices)``.
_OPERATION = Operation(
    "grouped_matmul",
    {
        "pallas_gpu": "jvlm_kernels.grouped.gpu",
        "pallas_tpu": "jvlm_kernels.grouped.tpu",
        "xla": "jvlm_kernels.grouped.xla",
    },
    batched=False,
)


def grouped_matmul(
    x: Float[Array, "N D"],
    matrices: Float[Array, "E D F"],
    sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "N F"]:
    """Return each row times the matrix of its group, as `jax.lax.ragged_dot` does.

    The first ``sizes[0]`` rows belong to group 0, the next ``sizes[1]`` to group 1, and so on. Products accumulate in
    float32. Rows behind the last group have undefined results and gradients; they add nothing to the gradient of
    ``matrices``.

    Args:
      sizes: rows of each group; their sum may be less than N.
      implementation, interpret: as in `segment_attention`.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
      Unavailable: the requested implementation cannot run this call; the message says why.
    """
    if matrices.shape[1] != x.shape[1] or sizes.shape != matrices.shape[:1]:
        raise ValueError(f"rows {x.shape}, matrices {matrices.shape} and sizes {sizes.shape} do not fit together")
    if matrices.dtype != x.dtype:
        raise ValueError(f"rows are {x.dtype}, matrices {matrices.dtype}")
    spec = GroupedSpec(interpret)
    names = _OPERATION.runnable(implementation, interpret, spec, x, matrices)
    operands = x, matrices, sizes.astype(jnp.int32)
    axes = varying_axes(
        *operands
    )  # an operand that varies over fewer has its gradient summed here, outside the kernels
    return _matmul(spec, names, *(mark_varying(a, axes) for a in operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(spec, names, x, matrices, sizes):
    return _OPERATION.run(spec, names, "forward", x, matrices, sizes)[0]


def _forward(spec, names, *inputs):
    return _matmul(spec, names, *inputs), inputs


def _backward(spec, names, inputs, d_y):
    return (*_OPERATION.run(spec, names, "backward", *inputs, d_y), None)


_matmul.defvjp(_forward, _backward)

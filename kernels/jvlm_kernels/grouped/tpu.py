"""Grouped matrix multiplication on TPU: XLA's own kernels, and a Pallas (Mosaic) kernel for the matrices' gradient.

XLA for TPU computes products of rows with the matrix of their group as kernels, but the gradient of the matrices as a
dense product, in which every row meets every group: E times the arithmetic. The kernel here sums the outer products of
the row blocks that each group touches; a block that several groups share is computed once for each of them.

Shapes: N rows in M row blocks, E groups, D input features, F output features; V work items.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jvlm_kernels import shapes
from jvlm_kernels.attention.block_plan import check_dtypes
from jvlm_kernels.constants import LANES
from jvlm_kernels.errors import Unavailable
from jvlm_kernels.tpu_common import dot

PLATFORM = "tpu"
_ROWS, _HEIGHT, _WIDTH = 256, 1024, 512


def check(spec, x, matrices) -> None:
    """Raise `Unavailable` for a call that the kernel cannot run."""
    check_dtypes(x, matrices, matrices, jnp.float32, jnp.bfloat16)
    if any(size % LANES for size in matrices.shape[1:]):
        raise Unavailable(f"needs matrices of multiples of {LANES}, got {matrices.shape[1:]}")


def forward(spec, x, matrices, sizes):
    """Return (y [N, F],)."""
    return (lax.ragged_dot(x, matrices, sizes),)


def backward(spec, x, matrices, sizes, d_y):
    """Return (dx, d_matrices)."""
    d_y = d_y.astype(x.dtype)
    (d_x,) = jax.vjp(lambda x: lax.ragged_dot(x, matrices, sizes), x)[1](d_y)
    return d_x, _outer(spec, x, d_y, sizes, matrices)


def _block(size: int, most: int) -> int:
    """Return the largest multiple of `LANES`, up to ``most``, that divides ``size``."""
    return next(block for block in range(most, 0, -LANES) if size % block == 0)


def _padded(x):
    """Return ``x`` padded with rows of zeros to whole row blocks."""
    return jnp.pad(x, ((0, -len(x) % _ROWS), (0, 0)))


def _work_items(sizes, blocks: int):
    """Return group and row block of each work item, and the first row of each group with the end of the last.

    Every group has an item, even an empty one, whose gradient must be written too. Items without rows have block M.
    """
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes)])
    first = starts[:-1] // _ROWS
    count = jnp.where(sizes > 0, -(-starts[1:] // _ROWS) - first, 1)
    ends = jnp.cumsum(count)
    item = jnp.arange(blocks + 2 * len(sizes) - 1, dtype=jnp.int32)
    found = jnp.searchsorted(ends, item, side="right").astype(jnp.int32)
    group = jnp.minimum(found, len(sizes) - 1)
    has_rows = (found < len(sizes)) & (sizes[group] > 0)
    block = jnp.where(has_rows, first[group] + item - (ends - count)[group], blocks)
    return group, block, starts


def _outer_kernel(groups, blocks, starts, x, d_y, d_matrices, total):
    item, last = pl.program_id(2), pl.num_programs(2) - 1
    group = groups[item]

    @pl.when((item == 0) | (groups[jnp.maximum(item - 1, 0)] != group))
    def _():
        total[...] = jnp.zeros_like(total)

    row = blocks[item] * _ROWS + lax.broadcasted_iota(jnp.int32, (_ROWS, 1), 0)
    in_group = (row >= starts[group]) & (row < starts[group + 1])
    # mask both: other rows may hold NaN; in float32, the register type of the mask
    a, b = (jnp.where(in_group, z[...].astype(jnp.float32), 0).astype(z.dtype) for z in (x, d_y))

    @pl.when(blocks[item] * _ROWS < starts[group + 1])
    def _():
        total[...] += dot(a, b, (0, 0))

    @pl.when((item == last) | (groups[jnp.minimum(item + 1, last)] != group))
    def _():
        d_matrices[...] = total[...].astype(d_matrices.dtype)


def _outer(spec, x, d_y, sizes, matrices):
    """Return the gradient of the matrices: for each group, the sum of its rows' outer products."""
    N, (_, D, F) = len(x), matrices.shape
    x, d_y = _padded(x), _padded(d_y)
    M, height, width = len(x) // _ROWS, _block(D, _HEIGHT), _block(F, _WIDTH)
    items = _work_items(sizes, M)

    def rows(side: int):
        return lambda i, j, item, groups, blocks, starts: (jnp.minimum(blocks[item], M - 1), (i, j)[side])

    traffic = (
        N * D * (F // width) + N * F * (D // height)
    ) * x.dtype.itemsize + matrices.size * matrices.dtype.itemsize
    return pl.pallas_call(
        _outer_kernel,
        out_shape=shapes.result_type(matrices.shape, matrices.dtype, (x, d_y)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(D // height, F // width, len(items[0])),
            in_specs=[pl.BlockSpec((_ROWS, height), rows(0)), pl.BlockSpec((_ROWS, width), rows(1))],
            out_specs=pl.BlockSpec(
                (None, height, width), lambda i, j, item, groups, blocks, starts: (groups[item], i, j)
            ),
            scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=2 * N * D * F, transcendentals=0, bytes_accessed=traffic),
        interpret=spec.interpret,
        name="grouped_matmul_outer",
    )(*items, x, d_y)

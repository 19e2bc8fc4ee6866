"""Grouped matrix multiplication on NVIDIA GPUs: Pallas (Triton) kernels over the row blocks that each group touches.

A row block that several groups share is computed once for each of them, and each time only the rows of that group are
stored. So the arithmetic is that of the rows, plus at most one row block for each group.

Shapes: N rows in M row blocks, E groups, D input features, F output features; V work items.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jvlm_kernels import shapes
from jvlm_kernels.attention.block_plan import check_dtypes
from jvlm_kernels.errors import Unavailable

PLATFORM = "cuda"
_ROWS, _COLUMNS, _MIN_SIDE = 128, 128, 16


def check(spec, x, matrices) -> None:
    """Raise `Unavailable` for a call that the kernels cannot run."""
    check_dtypes(x, matrices, matrices, jnp.float32, jnp.bfloat16, jnp.float16)
    if any(size % _MIN_SIDE for size in matrices.shape[1:]):
        raise Unavailable(f"needs matrices of multiples of {_MIN_SIDE}, got {matrices.shape[1:]}")


def forward(spec, x, matrices, sizes):
    """Return (y [N, F],)."""
    return (_matmul(spec, x, matrices, sizes, transposed=False),)


def backward(spec, x, matrices, sizes, d_y):
    """Return (dx, d_matrices)."""
    d_y = d_y.astype(x.dtype)
    return _matmul(spec, d_y, matrices, sizes, transposed=True), _outer(spec, x, d_y, sizes, matrices)


def _block(size: int, most: int) -> int:
    """Return the largest power of two, up to ``most``, that divides ``size``."""
    return math.gcd(size, most)


def _depth(dtype) -> int:
    """Return how many elements one step of the contraction reads: 128 bytes."""
    return 128 // jnp.dtype(dtype).itemsize


def _dot(a, b, **transposed):
    """Return the matrix product, accumulated in float32; float32 operands are not rounded to TensorFloat-32."""
    return plgpu.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None, **transposed)


def _padded(x):
    """Return ``x`` padded with rows of zeros to whole row blocks."""
    return jnp.pad(x, ((0, -len(x) % _ROWS), (0, 0)))


def _work_items(sizes, blocks: int):
    """Return (group, row block) of each work item, and the first row of each group with the end of the last.

    Items without work have group E.
    """
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes)])
    first = starts[:-1] // _ROWS
    count = jnp.where(sizes > 0, -(-starts[1:] // _ROWS) - first, 0)
    ends = jnp.cumsum(count)
    item = jnp.arange(blocks + len(sizes) - 1, dtype=jnp.int32)
    group = jnp.searchsorted(ends, item, side="right").astype(jnp.int32)
    valid = jnp.minimum(group, len(sizes) - 1)
    return group, first[valid] + item - (ends - count)[valid], starts


def _matmul_kernel(num_groups, depth, transposed, groups, blocks, starts, x, matrices, y):
    column, item = pl.program_id(0), pl.program_id(1)
    group = groups[item]
    width = y.shape[1] // pl.num_programs(0)
    columns = pl.ds(column * width, width)
    rows = pl.ds(blocks[item] * _ROWS, _ROWS)

    @pl.when(group < num_groups)
    def _():
        def step(index, acc):
            values = pl.ds(index * depth, depth)
            matrix = matrices[group, columns, values] if transposed else matrices[group, values, columns]
            return acc + _dot(x[rows, values], matrix, trans_b=transposed)

        acc = lax.fori_loop(0, x.shape[1] // depth, step, jnp.zeros((_ROWS, width), jnp.float32))
        row = blocks[item] * _ROWS + lax.broadcasted_iota(jnp.int32, acc.shape, 0)
        in_group = (row >= starts[group]) & (row < starts[group + 1])
        plgpu.store(y.at[rows, columns], acc.astype(y.dtype), mask=in_group)


def _matmul(spec, x, matrices, sizes, *, transposed: bool):
    """Return the rows times the matrix of their group, or its transpose."""
    N, E = len(x), len(matrices)
    width = matrices.shape[1 if transposed else 2]
    x = _padded(x)
    items = _work_items(sizes, len(x) // _ROWS)
    operands = (x, matrices)
    return pl.pallas_call(
        functools.partial(_matmul_kernel, E, _block(x.shape[1], _depth(x.dtype)), transposed),
        out_shape=shapes.result_type((len(x), width), x.dtype, operands),
        grid=(width // _block(width, _COLUMNS), len(items[0])),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=spec.interpret,
        name="grouped_matmul_transposed" if transposed else "grouped_matmul",
    )(*items, *operands)[:N]


def _outer_kernel(depth, starts, x, d_y, d_matrices):
    i, j, group = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    height, width = d_matrices.shape
    left, right = pl.ds(i * height, height), pl.ds(j * width, width)
    begin, end = starts[group], starts[group + 1]

    def step(index, acc):
        row = index * depth + lax.broadcasted_iota(jnp.int32, (depth, 1), 0)
        in_group, rows = (row >= begin) & (row < end), pl.ds(index * depth, depth)
        # mask both: other rows may hold NaN
        a, b = jnp.where(in_group, x[rows, left], 0), jnp.where(in_group, d_y[rows, right], 0)
        return acc + _dot(a, b, trans_a=True)

    last = lax.div(end + depth - 1, depth)
    acc = lax.fori_loop(lax.div(begin, depth), last, step, jnp.zeros((height, width), jnp.float32))
    d_matrices[...] = acc.astype(d_matrices.dtype)


def _outer(spec, x, d_y, sizes, matrices):
    """Return the gradient of the matrices: for each group, the sum of its rows' outer products."""
    x, d_y = _padded(x), _padded(d_y)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes)])
    E, D, F = matrices.shape
    height, width = _block(D, _ROWS), _block(F, _COLUMNS)
    operands = (x, d_y)
    whole = [pl.BlockSpec(a.shape, lambda *_, n=a.ndim: (0,) * n) for a in (starts, *operands)]
    return pl.pallas_call(
        functools.partial(_outer_kernel, _block(_ROWS, _depth(x.dtype))),
        out_shape=shapes.result_type(matrices.shape, matrices.dtype, operands),
        grid=(D // height, F // width, E),
        in_specs=whole,
        out_specs=pl.BlockSpec((None, height, width), lambda i, j, e: (e, i, j)),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=spec.interpret,
        name="grouped_matmul_outer",
    )(starts, *operands)

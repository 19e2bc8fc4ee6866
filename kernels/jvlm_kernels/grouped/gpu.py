"""Grouped products on NVIDIA GPUs: Pallas (Triton) kernels over the blocks of rows that each group touches.

A block of rows that several groups share is visited once for each; a visit writes its own group's rows alone. So the
arithmetic is that of the rows, and of at most one block more for each group.

Shapes: N rows in M blocks, E groups, D values of a row, F of a result; V visits.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jvlm_kernels import shapes
from jvlm_kernels.attention.plan import check_dtypes
from jvlm_kernels.errors import Unavailable

PLATFORM = "cuda"
_ROWS, _COLUMNS, _LEAST = 128, 128, 16


def check(spec, x, matrices) -> None:
    """Static reasons not to run."""
    check_dtypes(x, matrices, matrices, jnp.float32, jnp.bfloat16, jnp.float16)
    if any(size % _LEAST for size in matrices.shape[1:]):
        raise Unavailable(f"needs matrices of multiples of {_LEAST}, got {matrices.shape[1:]}")


def forward(spec, x, matrices, sizes):
    """(y [N, F],)."""
    return (_times(spec, x, matrices, sizes, transposed=False),)


def backward(spec, x, matrices, sizes, d_y):
    """(dx, d_matrices)."""
    d_y = d_y.astype(x.dtype)
    return _times(spec, d_y, matrices, sizes, transposed=True), _outer(spec, x, d_y, sizes, matrices)


def _block(size: int, most: int) -> int:
    """The largest power of two that divides a size, up to ``most``."""
    return math.gcd(size, most)


def _depth(dtype) -> int:
    """Values of a row in a step through what is summed: 128 bytes."""
    return 128 // jnp.dtype(dtype).itemsize


def _dot(a, b, **transposed):
    """Matrix product summed in float32; float32 operands are not rounded to TensorFloat-32."""
    return plgpu.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None, **transposed)


def _padded(x):
    """With rows of zeros, so that it is whole blocks."""
    return jnp.pad(x, ((0, -len(x) % _ROWS), (0, 0)))


def _visits(sizes, blocks: int):
    """(group, block of rows) of each visit, group E where there is none; and where groups begin, and the last ends."""
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes)])
    first = starts[:-1] // _ROWS
    count = jnp.where(sizes > 0, -(-starts[1:] // _ROWS) - first, 0)
    ends = jnp.cumsum(count)
    visit = jnp.arange(blocks + len(sizes) - 1, dtype=jnp.int32)
    group = jnp.searchsorted(ends, visit, side="right").astype(jnp.int32)
    own = jnp.minimum(group, len(sizes) - 1)
    return group, first[own] + visit - (ends - count)[own], starts


def _times_kernel(groups, depth, transposed, group, block, starts, x, matrices, y):
    column, visit = pl.program_id(0), pl.program_id(1)
    of = group[visit]
    width = y.shape[1] // pl.num_programs(0)
    columns = pl.ds(column * width, width)
    rows = pl.ds(block[visit] * _ROWS, _ROWS)

    @pl.when(of < groups)
    def _():
        def step(index, sums):
            values = pl.ds(index * depth, depth)
            matrix = matrices[of, columns, values] if transposed else matrices[of, values, columns]
            return sums + _dot(x[rows, values], matrix, trans_b=transposed)

        sums = lax.fori_loop(0, x.shape[1] // depth, step, jnp.zeros((_ROWS, width), jnp.float32))
        row = block[visit] * _ROWS + lax.broadcasted_iota(jnp.int32, sums.shape, 0)
        own = (row >= starts[of]) & (row < starts[of + 1])
        plgpu.store(y.at[rows, columns], sums.astype(y.dtype), mask=own)


def _times(spec, x, matrices, sizes, *, transposed: bool):
    """Rows times their group's matrix, or its transpose."""
    N, E = len(x), len(matrices)
    width = matrices.shape[1 if transposed else 2]
    x = _padded(x)
    visits = _visits(sizes, len(x) // _ROWS)
    operands = (x, matrices)
    return pl.pallas_call(
        functools.partial(_times_kernel, E, _block(x.shape[1], _depth(x.dtype)), transposed),
        out_shape=shapes.result((len(x), width), x.dtype, operands),
        grid=(width // _block(width, _COLUMNS), len(visits[0])),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=spec.interpret,
        name="grouped_product_transposed" if transposed else "grouped_product",
    )(*visits, *operands)[:N]


def _outer_kernel(depth, starts, x, d_y, d_matrices):
    i, j, of = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    height, width = d_matrices.shape
    left, right = pl.ds(i * height, height), pl.ds(j * width, width)
    begin, end = starts[of], starts[of + 1]

    def step(index, sums):
        row = index * depth + lax.broadcasted_iota(jnp.int32, (depth, 1), 0)
        own, rows = (row >= begin) & (row < end), pl.ds(index * depth, depth)
        # both, because what lies in other rows may be no number
        a, b = jnp.where(own, x[rows, left], 0), jnp.where(own, d_y[rows, right], 0)
        return sums + _dot(a, b, trans_a=True)

    last = lax.div(end + depth - 1, depth)
    sums = lax.fori_loop(lax.div(begin, depth), last, step, jnp.zeros((height, width), jnp.float32))
    d_matrices[...] = sums.astype(d_matrices.dtype)


def _outer(spec, x, d_y, sizes, matrices):
    """Gradient of the matrices: for each group, its rows' outer products."""
    x, d_y = _padded(x), _padded(d_y)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes)])
    E, D, F = matrices.shape
    height, width = _block(D, _ROWS), _block(F, _COLUMNS)
    operands = (x, d_y)
    whole = [pl.BlockSpec(a.shape, lambda *_, n=a.ndim: (0,) * n) for a in (starts, *operands)]
    return pl.pallas_call(
        functools.partial(_outer_kernel, _block(_ROWS, _depth(x.dtype))),
        out_shape=shapes.result(matrices.shape, matrices.dtype, operands),
        grid=(D // height, F // width, E),
        in_specs=whole,
        out_specs=pl.BlockSpec((None, height, width), lambda i, j, e: (e, i, j)),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=spec.interpret,
        name="grouped_product_outer",
    )(starts, *operands)

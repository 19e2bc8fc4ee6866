"""Decode attention on TPU: a Pallas (Mosaic) kernel over the blocks of the cache that a sequence can attend to.

A block is a page, or Z consecutive entries of a cache row. The list of those within each sequence's length (and window)
is the grid, so an empty part of the cache costs nothing. One grid step computes all key heads of a block. Shapes:
Q = G * S queries of a key head, padded to whole sublanes; Z entries of a block.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jvlm_kernels import shapes
from jvlm_kernels.attention import block_pairs
from jvlm_kernels.attention.block_plan import check_dtypes
from jvlm_kernels.constants import LANES, MASK_VALUE
from jvlm_kernels.errors import Unavailable
from jvlm_kernels.tpu_common import VMEM_BYTES, OnlineSoftmax, dot

PLATFORM = "tpu"
_SUBLANES = 16  # of bfloat16, the narrower of the types taken
_MAX_BLOCK = 512


def check(spec, q, keys, values) -> None:
    """Raise `Unavailable` for a call that the kernel cannot run."""
    check_dtypes(q, keys, values, jnp.float32, jnp.bfloat16)
    if not spec.paged and keys.shape[3] % LANES:
        raise Unavailable(f"needs a cache length that is a multiple of {LANES}, got {keys.shape[3]}")
    if not spec.paged and not block_pairs.fits(q.shape[0], 1, keys.shape[3] // block_size(spec, keys)):
        raise Unavailable(
            f"{q.shape[0]} sequences of {keys.shape[3]} cache entries have more blocks than work items can number"
        )


def block_size(spec, keys) -> int:
    """Return the entries of a block: those of a page, or the largest divisor of the cache length up to `_MAX_BLOCK`."""
    length = keys.shape[3]
    if spec.paged:
        return length
    return max(z for z in range(LANES, min(_MAX_BLOCK, length) + 1, LANES) if length % z == 0)


def in_reach(spec, lengths, new: int, block: int, count: int):
    """Return [B, count]: whether one of the new tokens attends to an entry of the block."""
    first = jnp.arange(count) * block
    needed = first < lengths[:, None]
    if spec.window is not None:
        needed &= first + block > lengths[:, None] - new - spec.window + 1
    return needed


def _kernel(spec, S: int, K: int, block: int, items, lengths, tables, q, keys, values, out, *scratch):
    item = items[pl.program_id(0)]
    length = lengths[block_pairs.block_row(item)]

    softmax = OnlineSoftmax(*scratch)
    pl.when(block_pairs.is_first(item))(softmax.reset)
    pl.when(block_pairs.is_partial(item))(lambda: _step(spec, S, K, block, item, length, q, keys, values, softmax))

    @pl.when(block_pairs.is_last(item))
    def end():
        for h in range(K):
            out[h] = softmax.result(h)[0].astype(out.dtype)


def _step(spec, S: int, K: int, block: int, item, length, q, keys, values, softmax: OnlineSoftmax):
    shape = (q.shape[1], block)
    # row r is new token r % S; the padding rows at the end repeat them
    position = length - S + lax.rem(lax.broadcasted_iota(jnp.int32, shape, 0), S)
    distance = position - (block_pairs.block_column(item) * block + lax.broadcasted_iota(jnp.int32, shape, 1))
    visible = distance >= 0
    if spec.window is not None:
        visible &= distance < spec.window
    for h in range(K):
        softmax.update(h, jnp.where(visible, dot(q[h], keys[h]) * spec.scale, MASK_VALUE), values[h])


def _cost(q, keys, blocks: int, block: int) -> pl.CostEstimate:
    """Return the work of full sequences. Else XLA counts the pages of all layers, of which a call reads one layer's."""
    (_, S, H, D), K = q.shape, keys.shape[1]
    return pl.CostEstimate(
        flops=4 * blocks * block * S * H * D,
        transcendentals=blocks * block * S * H,
        bytes_accessed=2 * blocks * block * K * D * keys.dtype.itemsize + 2 * q.size * q.dtype.itemsize,
    )


def attend(spec, q, keys, values, lengths, tables):
    """Return (out [B, S, H, D],)."""
    B, S, H, D = q.shape
    K, block = keys.shape[1], block_size(spec, keys)
    count = tables.shape[1] if spec.paged else keys.shape[3] // block
    reach = count if spec.window is None else min(count, (spec.window + S - 2) // block + 2)
    G, Q = H // K, -(-(H // K * S) // _SUBLANES) * _SUBLANES
    queries = jnp.moveaxis(q.reshape(B, S, K, G, D), 1, 3).reshape(B, K, G * S, D)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, Q - G * S), (0, 0)))
    needed = in_reach(spec, lengths, S, block, count)[:, None]
    pairs = block_pairs.list_pairs(needed, jnp.zeros_like(needed), B * count, cover_empty_rows=True)

    def per_sequence(step, items, lengths, tables):
        return block_pairs.block_row(items[step]), 0, 0, 0

    def cached(transposed: bool):
        def index(step, items, lengths, tables):
            row, number = block_pairs.block_row(items[step]), block_pairs.block_column(items[step])
            if spec.paged:
                return tables[row * count + number], 0, 0, 0
            return (row, 0, 0, number) if transposed else (row, 0, number, 0)

        return index

    operands = (queries, keys, values)
    out = pl.pallas_call(
        functools.partial(_kernel, spec, S, K, block),
        out_shape=shapes.result_type(queries.shape, q.dtype, operands),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pairs.count,),
            in_specs=[
                pl.BlockSpec((None, K, Q, D), per_sequence),
                pl.BlockSpec((None, K, D, block), cached(True)),
                pl.BlockSpec((None, K, block, D), cached(False)),
            ],
            out_specs=pl.BlockSpec((None, K, Q, D), per_sequence),
            scratch_shapes=[
                pltpu.VMEM((K, Q, LANES), jnp.float32),
                pltpu.VMEM((K, Q, LANES), jnp.float32),
                pltpu.VMEM((K, Q, D), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=_cost(q, keys, B * reach, block),
        interpret=spec.interpret,
        name="decode_attention",
    )(pairs.items, lengths, tables.reshape(-1), *operands)
    out = out[:, :, : G * S].reshape(B, K, G, S, D)
    return (jnp.moveaxis(out, 3, 1).reshape(q.shape),)

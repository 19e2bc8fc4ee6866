"""Decode attention on TPU: a Pallas (Mosaic) kernel over the blocks of cache that hold something to see.

A block is some places of a row, or a page; the list of those within each sequence's length (and window) is the grid, so
an empty part of the cache costs nothing. All key heads of a block are computed in one step. Shapes: Q = G * S query
rows of a key head, padded to whole sublanes; Z places of a block.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jvlm_kernels import shapes
from jvlm_kernels.attention import blocks
from jvlm_kernels.attention.plan import check_dtypes
from jvlm_kernels.errors import Unavailable
from jvlm_kernels.mosaic import HIDDEN, LANES, VMEM_BYTES, OnlineSoftmax, dot

PLATFORM = "tpu"
_SUBLANES = 16  # of bfloat16, the narrower of the types taken
_BLOCK = 512


def check(spec, q, keys, values) -> None:
    """Static reasons not to run."""
    check_dtypes(q, keys, values, jnp.float32, jnp.bfloat16)
    if not spec.paged and keys.shape[3] % LANES:
        raise Unavailable(f"needs a cache of whole lanes of {LANES} places, got {keys.shape[3]}")
    if not spec.paged and not blocks.fits(q.shape[0], 1, keys.shape[3] // block_of(spec, keys)):
        raise Unavailable(f"{q.shape[0]} sequences of {keys.shape[3]} places have too many blocks to number")


def block_of(spec, keys) -> int:
    """Places of a block: a page, or the largest divisor of a row's places that is not above `_BLOCK`."""
    places = keys.shape[3]
    if spec.paged:
        return places
    return max(z for z in range(LANES, min(_BLOCK, places) + 1, LANES) if places % z == 0)


def in_reach(spec, lengths, new: int, block: int, count: int):
    """[B, count]: the blocks in which one of the new tokens sees a place."""
    first = jnp.arange(count) * block
    some = first < lengths[:, None]
    if spec.window is not None:
        some &= first + block > lengths[:, None] - new - spec.window + 1
    return some


def _kernel(spec, S: int, K: int, block: int, items, lengths, tables, q, keys, values, out, *scratch):
    item = items[pl.program_id(0)]
    length = lengths[blocks.line_of(item)]

    softmax = OnlineSoftmax(*scratch)
    pl.when(blocks.is_first(item))(softmax.begin)
    pl.when(blocks.is_masked(item))(lambda: _step(spec, S, K, block, item, length, q, keys, values, softmax))

    @pl.when(blocks.is_last(item))
    def end():
        for h in range(K):
            out[h] = softmax.result(h)[0].astype(out.dtype)


def _step(spec, S: int, K: int, block: int, item, length, q, keys, values, softmax: OnlineSoftmax):
    shape = (q.shape[1], block)
    # row r is new token r % S; the padding rows at the end repeat them
    place = length - S + lax.rem(lax.broadcasted_iota(jnp.int32, shape, 0), S)
    behind = place - (blocks.partner_of(item) * block + lax.broadcasted_iota(jnp.int32, shape, 1))
    visible = behind >= 0
    if spec.window is not None:
        visible &= behind < spec.window
    for h in range(K):
        softmax.add(h, jnp.where(visible, dot(q[h], keys[h]) * spec.scale, HIDDEN), values[h])


def attend(spec, q, keys, values, lengths, tables):
    """(out [B, S, H, D],)."""
    B, S, H, D = q.shape
    K, block = keys.shape[1], block_of(spec, keys)
    count = tables.shape[1] if spec.paged else keys.shape[3] // block
    G, Q = H // K, -(-(H // K * S) // _SUBLANES) * _SUBLANES
    rows = jnp.moveaxis(q.reshape(B, S, K, G, D), 1, 3).reshape(B, K, G * S, D)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, Q - G * S), (0, 0)))
    some = in_reach(spec, lengths, S, block, count)[:, None]
    visits = blocks.list_visits(some, jnp.zeros_like(some), B * count, fill=True)

    def own(step, items, lengths, tables):
        return blocks.line_of(items[step]), 0, 0, 0

    def cached(transposed: bool):
        def index(step, items, lengths, tables):
            line, number = blocks.line_of(items[step]), blocks.partner_of(items[step])
            if spec.paged:
                return tables[line * count + number], 0, 0, 0
            return (line, 0, 0, number) if transposed else (line, 0, number, 0)

        return index

    operands = (rows, keys, values)
    out = pl.pallas_call(
        functools.partial(_kernel, spec, S, K, block),
        out_shape=shapes.result(rows.shape, q.dtype, operands),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(visits.count,),
            in_specs=[
                pl.BlockSpec((None, K, Q, D), own),
                pl.BlockSpec((None, K, D, block), cached(True)),
                pl.BlockSpec((None, K, block, D), cached(False)),
            ],
            out_specs=pl.BlockSpec((None, K, Q, D), own),
            scratch_shapes=[
                pltpu.VMEM((K, Q, LANES), jnp.float32),
                pltpu.VMEM((K, Q, LANES), jnp.float32),
                pltpu.VMEM((K, Q, D), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        interpret=spec.interpret,
        name="decode_attention",
    )(visits.items, lengths, tables.reshape(-1), *operands)
    out = out[:, :, : G * S].reshape(B, K, G, S, D)
    return (jnp.moveaxis(out, 3, 1).reshape(q.shape),)

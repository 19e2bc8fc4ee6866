"""Decode attention on NVIDIA GPUs: a Pallas (Triton) kernel that splits each sequence's past over several programs.

One new token is one row of work a head, too little for a GPU; so the past is cut into parts that are attended to side
by side, and put together by their logsumexps (as in Flash-Decoding). Shapes: Q = G * S query rows of a key head,
padded to what a matrix product needs; Z places of a block; P parts.
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
_ROWS = 16  # least rows of a Triton matrix product
_BLOCK = 64
_PROGRAMS = 264  # two for each of a Hopper's 132 multiprocessors
_HIDDEN, _LOWEST = -1e30, -1e20
_LOG2E = math.log2(math.e)


def check(spec, q, keys, values) -> None:
    """Static reasons not to run."""
    D, places = keys.shape[2:]
    check_dtypes(q, keys, values, jnp.float32, jnp.bfloat16, jnp.float16)
    if D & (D - 1) or not 16 <= D <= 256:
        raise Unavailable(f"needs a head size that is a power of two from 16 to 256, got {D}")
    if places % 16 or (spec.paged and places & (places - 1)):
        unit = "pages of a power of two from 16" if spec.paged else "a cache of a multiple of 16"
        raise Unavailable(f"needs {unit} places, got {places}")


def _kernel(spec, S, block, blocks_of_part, tables, lengths, q, keys, values, out, lse):
    part, row = pl.program_id(0), pl.program_id(2)
    length, queries = lengths[row], q[...]
    Q, D = queries.shape
    place = length - S + lax.rem(lax.broadcasted_iota(jnp.int32, (Q, block), 0), S)
    column = lax.broadcasted_iota(jnp.int32, (Q, block), 1)
    precision = lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None

    def step(number, carry):
        top, total, sums = carry
        if spec.paged:
            page = tables[row, number]
            k, v = keys[page, :, :], values[page, :, :]
        else:
            at = pl.ds(number * block, block)
            k, v = keys[:, at], values[at, :]
        behind = place - (number * block + column)
        visible = behind >= 0
        if spec.window is not None:
            visible &= behind < spec.window
        scores = jnp.where(visible, plgpu.dot(queries, k, precision=precision) * (spec.scale * _LOG2E), _HIDDEN)
        now = jnp.maximum(top, scores.max(1))
        weights, shrink = jnp.exp2(scores - now[:, None]), jnp.exp2(top - now)
        sums = sums * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v, precision=precision)
        return now, total * shrink + weights.sum(1), sums

    first = part * blocks_of_part
    if spec.window is not None:
        first = jnp.maximum(first, lax.div(jnp.maximum(length - S - spec.window + 1, 0), block))
    last = jnp.minimum((part + 1) * blocks_of_part, lax.div(length + block - 1, block))
    zeros = jnp.zeros((Q,), jnp.float32)
    start = zeros + _LOWEST, zeros, jnp.zeros((Q, D), jnp.float32)
    top, total, sums = lax.fori_loop(first, last, step, start)
    divisor = jnp.where(total > 0, total, 1.0)
    out[...] = sums / divisor[:, None]
    lse[...] = jnp.where(total > 0, top + jnp.log2(divisor), _LOWEST)


def attend(spec, q, keys, values, lengths, tables):
    """(out [B, S, H, D],)."""
    B, S, H, D = q.shape
    K, places = keys.shape[1], keys.shape[3]
    block = places if spec.paged else math.gcd(places, _BLOCK)
    count = tables.shape[1] if spec.paged else places // block
    parts = max(1, min(count, _PROGRAMS // (B * K)))
    of_part = -(-count // parts)
    G = H // K
    Q = max(_ROWS, 1 << (G * S - 1).bit_length())
    rows = jnp.moveaxis(q.reshape(B, S, K, G, D), 1, 3).reshape(B, K, G * S, D)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, Q - G * S), (0, 0)))
    if spec.paged:
        of_head = [
            pl.BlockSpec((keys.shape[0], None, *x.shape[2:]), lambda p, h, b: (0, h, 0, 0)) for x in (keys, values)
        ]
    else:
        of_head = [pl.BlockSpec((None, None, *x.shape[2:]), lambda p, h, b: (b, h, 0, 0)) for x in (keys, values)]
    operands = (rows, keys, values)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, spec, S, block, of_part),
        out_shape=[
            shapes.result((parts, B, K, Q, D), jnp.float32, operands),
            shapes.result((parts, B, K, Q), jnp.float32, operands),
        ],
        grid=(parts, K, B),
        in_specs=[
            pl.BlockSpec(tables.shape, lambda p, h, b: (0, 0)),
            pl.BlockSpec(lengths.shape, lambda p, h, b: (0,)),
            pl.BlockSpec((None, None, Q, D), lambda p, h, b: (b, h, 0, 0)),
            *of_head,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, Q, D), lambda p, h, b: (p, b, h, 0, 0)),
            pl.BlockSpec((None, None, None, Q), lambda p, h, b: (p, b, h, 0)),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=spec.interpret,
        name="decode_attention",
    )(tables, lengths, *operands)
    share = jnp.exp2(lse - lse.max(0))
    share = jnp.where(lse > _LOWEST, share, 0.0)
    total = share.sum(0)
    out = (out * share[..., None]).sum(0) / jnp.where(total > 0, total, 1.0)[..., None]
    out = out[:, :, : G * S].reshape(B, K, G, S, D).astype(q.dtype)
    return (jnp.moveaxis(out, 3, 1).reshape(q.shape),)

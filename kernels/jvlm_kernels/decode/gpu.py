"""Decode attention on NVIDIA GPUs: a Pallas (Triton) kernel that splits the cache of each sequence over programs.

One new token is one query for each head, too little work for a GPU. So the keys of a sequence are divided into splits
that different programs compute; the results are combined by their logsumexps (Flash-Decoding). Shapes: Q = G * S
queries of a key head, padded to what a matrix product needs; Z entries of a block; P splits.
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
from jvlm_kernels.constants import LOG2E, MASK_VALUE, NEG_INF
from jvlm_kernels.errors import Unavailable

PLATFORM = "cuda"
_MIN_QUERIES = 16  # smallest side of a Triton matrix product
_BLOCK = 64
_PROGRAMS = 264  # two for each of a Hopper's 132 multiprocessors


def check(spec, q, keys, values) -> None:
    """Raise `Unavailable` for a call that the kernel cannot run."""
    D, length = keys.shape[2:]
    check_dtypes(q, keys, values, jnp.float32, jnp.bfloat16, jnp.float16)
    if D & (D - 1) or not 16 <= D <= 256:
        raise Unavailable(f"needs a head size that is a power of two from 16 to 256, got {D}")
    if length % 16 or (spec.paged and length & (length - 1)):
        unit = "a page size that is a power of two from 16" if spec.paged else "a cache length that is a multiple of 16"
        raise Unavailable(f"needs {unit}, got {length}")


def _kernel(spec, S, block, blocks_per_split, tables, lengths, q, keys, values, out, lse):
    split, sequence = pl.program_id(0), pl.program_id(2)
    length, queries = lengths[sequence], q[...]
    Q, D = queries.shape
    position = length - S + lax.rem(lax.broadcasted_iota(jnp.int32, (Q, block), 0), S)
    column = lax.broadcasted_iota(jnp.int32, (Q, block), 1)
    precision = lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None

    def step(number, carry):
        running_max, running_sum, acc = carry
        if spec.paged:
            page = tables[sequence, number]
            k, v = keys[page, :, :], values[page, :, :]
        else:
            at = pl.ds(number * block, block)
            k, v = keys[:, at], values[at, :]
        distance = position - (number * block + column)
        visible = distance >= 0
        if spec.window is not None:
            visible &= distance < spec.window
        scores = jnp.where(visible, plgpu.dot(queries, k, precision=precision) * (spec.scale * LOG2E), MASK_VALUE)
        new_max = jnp.maximum(running_max, scores.max(1))
        weights, rescale = jnp.exp2(scores - new_max[:, None]), jnp.exp2(running_max - new_max)
        acc = acc * rescale[:, None] + plgpu.dot(weights.astype(v.dtype), v, precision=precision)
        return new_max, running_sum * rescale + weights.sum(1), acc

    first = split * blocks_per_split
    if spec.window is not None:
        first = jnp.maximum(first, lax.div(jnp.maximum(length - S - spec.window + 1, 0), block))
    last = jnp.minimum((split + 1) * blocks_per_split, lax.div(length + block - 1, block))
    zeros = jnp.zeros((Q,), jnp.float32)
    start = zeros + NEG_INF, zeros, jnp.zeros((Q, D), jnp.float32)
    running_max, running_sum, acc = lax.fori_loop(first, last, step, start)
    divisor = jnp.where(running_sum > 0, running_sum, 1.0)
    out[...] = acc / divisor[:, None]
    lse[...] = jnp.where(running_sum > 0, running_max + jnp.log2(divisor), NEG_INF)


def attend(spec, q, keys, values, lengths, tables):
    """Return (out [B, S, H, D],)."""
    B, S, H, D = q.shape
    K, length = keys.shape[1], keys.shape[3]
    block = length if spec.paged else math.gcd(length, _BLOCK)
    count = tables.shape[1] if spec.paged else length // block
    splits = max(1, min(count, _PROGRAMS // (B * K)))
    blocks_per_split = -(-count // splits)
    G = H // K
    Q = max(_MIN_QUERIES, 1 << (G * S - 1).bit_length())
    queries = jnp.moveaxis(q.reshape(B, S, K, G, D), 1, 3).reshape(B, K, G * S, D)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, Q - G * S), (0, 0)))
    if spec.paged:
        cache_specs = [
            pl.BlockSpec((keys.shape[0], None, *x.shape[2:]), lambda p, h, b: (0, h, 0, 0)) for x in (keys, values)
        ]
    else:
        cache_specs = [pl.BlockSpec((None, None, *x.shape[2:]), lambda p, h, b: (b, h, 0, 0)) for x in (keys, values)]
    operands = (queries, keys, values)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, spec, S, block, blocks_per_split),
        out_shape=[
            shapes.result_type((splits, B, K, Q, D), jnp.float32, operands),
            shapes.result_type((splits, B, K, Q), jnp.float32, operands),
        ],
        grid=(splits, K, B),
        in_specs=[
            pl.BlockSpec(tables.shape, lambda p, h, b: (0, 0)),
            pl.BlockSpec(lengths.shape, lambda p, h, b: (0,)),
            pl.BlockSpec((None, None, Q, D), lambda p, h, b: (b, h, 0, 0)),
            *cache_specs,
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
    share = jnp.where(lse > NEG_INF, share, 0.0)
    total = share.sum(0)
    out = (out * share[..., None]).sum(0) / jnp.where(total > 0, total, 1.0)[..., None]
    out = out[:, :, : G * S].reshape(B, K, G, S, D).astype(q.dtype)
    return (jnp.moveaxis(out, 3, 1).reshape(q.shape),)

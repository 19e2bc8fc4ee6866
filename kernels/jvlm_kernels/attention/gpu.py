"""Segment attention on NVIDIA GPUs: Pallas (Triton) kernels that visit only the blocks of scores that are needed.

One program computes one block of queries of one head (or of keys, for their gradients) and walks its own part of the
list of visits (`jvlm_kernels.attention.blocks`), so no launch and no loop step is spent on other blocks. Online softmax
and the recomputing backward pass are FlashAttention-2's (arXiv 2307.08691).

Shapes: B rows, N query blocks, M key blocks, D head size, read and multiplied in parts that are powers of two.
"""

from __future__ import annotations

import functools
import math
import struct

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jvlm_kernels import shapes
from jvlm_kernels.attention import blocks, tuning
from jvlm_kernels.attention.plan import PaddedPlan, check_dtypes, normalisers, padded_ids
from jvlm_kernels.errors import Unavailable

PLATFORM = "cuda"
_LOWEST = -1e20
_LOG2E = math.log2(math.e)
_LARGEST_HEAD = 256


def check(spec, q, k, v) -> None:
    """Static reasons not to run."""
    check_dtypes(q, k, v, jnp.float32, jnp.bfloat16, jnp.float16)
    if q.shape[-1] > _LARGEST_HEAD:
        raise Unavailable(f"a head of {q.shape[-1]} does not fit shared memory; at most {_LARGEST_HEAD}")
    if spec.scale <= 0:
        raise Unavailable(f"takes a positive scale, got {spec.scale}")
    for kernel in tuning.CUDA_KERNELS:
        _plan(spec, q, k, kernel)


def _plan(spec, q, k, kernel: str) -> _Plan:
    return _Plan.of(spec, q, k, tuning.cuda_blocks(spec, q, k, kernel))


class _Plan(PaddedPlan):
    """Sizes of a call, and the layout that the kernels want."""

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(first, size) of the parts in which a head is read and multiplied; see `head_parts`.

        One of float32, whose products take three instructions each: the compiler spills the registers of two.
        """
        return head_parts(self.D) if self.itemsize == 2 else ((0, max(16, 1 << (self.D - 1).bit_length())),)

    @property
    def head(self) -> int:
        """The head size that a block has."""
        return sum(size for _, size in self.parts)

    @property
    def params(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(num_warps=self.sizes.warps, num_stages=2)


def head_parts(size: int) -> tuple[tuple[int, int], ...]:
    """Powers of two, from 16 on, that hold a head: 128, 64 + 16 for a head of 80, 64 + 32 for 96. At most two of them.

    Triton multiplies powers of two alone; a head of 80 padded to 128 would read and multiply three fifths more.
    """
    whole = max(16, 1 << (size - 1).bit_length())
    half = whole // 2
    rest = max(16, 1 << max(size - half - 1, 0).bit_length())
    return ((0, whole),) if half < 16 or rest >= half else ((0, half), (half, rest))


def _parts(plan: _Plan, ref, *index) -> tuple:
    """Blocks [..., size] of each part of the head."""
    return tuple(ref[(*index, slice(first, first + size))] for first, size in plan.parts)


def _write(plan: _Plan, ref, values, factor: float = 1.0) -> None:
    for (first, size), value in zip(plan.parts, values, strict=True):
        ref[:, first : first + size] = (value * factor).astype(ref.dtype)


def _zeros(plan: _Plan, rows: int) -> tuple:
    return tuple(jnp.zeros((rows, size), jnp.float32) for _, size in plan.parts)


def _dot(spec, a, b, **transposed):
    """Matrix product summed in float32; of float32 operands by three of TensorFloat-32, which loses next to nothing."""
    precision = None
    if a.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST if spec.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return plgpu.dot(a, b, precision=precision, **transposed)


def _dot_heads(spec, a: tuple, b: tuple):
    """Products over the head of [X, head] and [Y, head]: [X, Y]."""
    return sum(_dot(spec, x, y, trans_b=True) for x, y in zip(a, b, strict=True))


def _exp2(spec, x, factor: float, minus):
    """2 ** (x * factor - minus), ``minus`` broadcast to x; results below the smallest normal number are 0.

    Two instructions for each score; without contraction and with those numbers kept it would be seven.
    """
    if spec.interpret:
        return jnp.exp2(x * factor - minus)
    constant = "0f" + struct.pack(">f", factor).hex()
    (found,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 t; fma.rn.ftz.f32 t, $1, {constant}, $2; ex2.approx.ftz.f32 $0, t; }}",
        args=[x, jnp.broadcast_to(-minus, x.shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return found


def _visible(spec, q_ids, kv_ids, q_first, kv_first, *, q_axis: int = 0):
    """Mask [block_q, block_kv], or [block_kv, block_q] with queries along axis 1."""
    mask = jnp.expand_dims(q_ids, 1 - q_axis) == jnp.expand_dims(kv_ids, q_axis)
    if spec.causal or spec.window is not None:
        q_index = q_first + lax.broadcasted_iota(jnp.int32, mask.shape, q_axis)
        distance = q_index - (kv_first + lax.broadcasted_iota(jnp.int32, mask.shape, 1 - q_axis))
        if spec.causal:
            mask &= distance >= 0
        if spec.window is not None:
            # not of |distance|, which an assembler of CUDA 13 is reported to get wrong (docs/kernels.md)
            mask &= distance < spec.window
            if not spec.causal:
                mask &= distance > -spec.window
    return mask


def _scores(spec, item, rows: tuple, columns: tuple, mask):
    """Products of queries and keys, not scaled yet; hidden ones -inf. ``mask()`` is worked out where it is needed."""
    return lax.cond(
        blocks.is_full(item),
        lambda products: products,
        lambda products: jnp.where(mask(), products, -jnp.inf),
        _dot_heads(spec, rows, columns),
    )


def _forward_kernel(spec, plan: _Plan, items, starts, offsets, q, k, v, q_ids, kv_ids, out, lse):
    i, row = pl.program_id(0), pl.program_id(2)
    line = row * plan.N + i
    queries = _parts(plan, q, slice(None))
    q_first = i * plan.block_q + offsets[row]
    factor = spec.scale * _LOG2E  # so that exp2 is the exponential

    def step(visit, carry):
        top, total, sums = carry
        item = items[visit]
        kv_first = blocks.partner_of(item) * plan.block_kv
        keys = pl.ds(kv_first, plan.block_kv)
        scores = _scores(
            spec,
            item,
            queries,
            _parts(plan, k, keys),
            lambda: _visible(spec, q_ids[...], kv_ids[keys], q_first, kv_first),
        )
        now = jnp.maximum(top, scores.max(1) * factor)
        weights, shrink = _exp2(spec, scores, factor, now[:, None]), _exp2(spec, top, 1.0, now)
        values = _parts(plan, v, keys)
        low = weights.astype(v.dtype)
        sums = tuple(s * shrink[:, None] + _dot(spec, low, x) for s, x in zip(sums, values, strict=True))
        return now, total * shrink + weights.sum(1), sums

    zeros = jnp.zeros((plan.block_q,), jnp.float32)
    start = zeros + _LOWEST, zeros, _zeros(plan, plan.block_q)
    top, total, sums = lax.fori_loop(starts[line], starts[line + 1], step, start)
    seen = total > 0
    divisor = jnp.where(seen, total, 1.0)
    _write(plan, out, [s / divisor[:, None] for s in sums])
    lse[...] = jnp.where(seen, (top + jnp.log2(divisor)) / _LOG2E, -jnp.inf)


def _d_queries_kernel(spec, plan: _Plan, items, starts, offsets, q, k, v, d_out, lse, delta, q_ids, kv_ids, d_q):
    i, row = pl.program_id(0), pl.program_id(2)
    line = row * plan.N + i
    queries, d_outs = _parts(plan, q, slice(None)), _parts(plan, d_out, slice(None))
    lse2, deltas = lse[...] * _LOG2E, delta[...]
    q_first = i * plan.block_q + offsets[row]

    def step(visit, sums):
        item = items[visit]
        kv_first = blocks.partner_of(item) * plan.block_kv
        rows = pl.ds(kv_first, plan.block_kv)
        keys = _parts(plan, k, rows)
        scores = _scores(spec, item, queries, keys, lambda: _visible(spec, q_ids[...], kv_ids[rows], q_first, kv_first))
        weights = _exp2(spec, scores, spec.scale * _LOG2E, lse2[:, None])
        d_scores = weights * (_dot_heads(spec, d_outs, _parts(plan, v, rows)) - deltas[:, None])
        low = d_scores.astype(k.dtype)
        return tuple(s + _dot(spec, low, x) for s, x in zip(sums, keys, strict=True))

    sums = lax.fori_loop(starts[line], starts[line + 1], step, _zeros(plan, plan.block_q))
    _write(plan, d_q, sums, spec.scale)


def _d_keys_kernel(spec, plan: _Plan, items, starts, offsets, q, k, v, d_out, lse, delta, q_ids, kv_ids, d_k, d_v):
    j, row = pl.program_id(0), pl.program_id(2)
    line = row * plan.M + j
    keys, values = _parts(plan, k, slice(None)), _parts(plan, v, slice(None))
    kv_first = j * plan.block_kv

    def of_head(g, sums):
        def step(visit, carry):
            sums_k, sums_v = carry
            item = items[visit]
            place = blocks.partner_of(item) * plan.block_q
            rows = pl.ds(place, plan.block_q)
            queries, d_outs = _parts(plan, q, rows, g), _parts(plan, d_out, rows, g)
            first = place + offsets[row]
            # keys along the rows: the weights multiply d_outs and queries from registers as they are
            scores = _scores(
                spec, item, keys, queries, lambda: _visible(spec, q_ids[rows], kv_ids[...], first, kv_first, q_axis=1)
            )
            weights = _exp2(spec, scores, spec.scale * _LOG2E, lse[rows, g][None, :] * _LOG2E)
            d_scores = weights * (_dot_heads(spec, values, d_outs) - delta[rows, g][None, :])
            low, low_d = weights.astype(d_out.dtype), d_scores.astype(q.dtype)
            return (
                tuple(s + _dot(spec, low_d, x) for s, x in zip(sums_k, queries, strict=True)),
                tuple(s + _dot(spec, low, x) for s, x in zip(sums_v, d_outs, strict=True)),
            )

        return lax.fori_loop(starts[line], starts[line + 1], step, sums)

    start = _zeros(plan, plan.block_kv), _zeros(plan, plan.block_kv)
    sums_k, sums_v = lax.fori_loop(0, plan.G, of_head, start)
    _write(plan, d_k, sums_k, spec.scale)
    _write(plan, d_v, sums_v)


def _call(kernel, spec, plan: _Plan, name: str, grid, visits, offsets, operands, in_specs, outputs):
    """Launch over ``grid`` (blocks, heads, rows); ``outputs`` are (shape, dtype, BlockSpec)."""
    whole = [pl.BlockSpec(x.shape, lambda *_: (0,)) for x in (visits.items, visits.starts, offsets)]
    return pl.pallas_call(
        functools.partial(kernel, spec, plan),
        out_shape=[shapes.result(shape, dtype, operands) for shape, dtype, _ in outputs],
        grid=grid,
        in_specs=[*whole, *in_specs],
        out_specs=[block for _, _, block in outputs],
        compiler_params=plan.params,
        interpret=spec.interpret,
        name=name,
    )(visits.items, visits.starts, offsets, *operands)


def _prepare(spec, plan: _Plan, q_segments, kv_segments, offsets):
    """Ids in whole blocks, and the blocks to visit."""
    q_ids, kv_ids = padded_ids(q_segments, kv_segments, plan.N * plan.block_q, plan.M * plan.block_kv)
    return q_ids, kv_ids, plan.visited(spec, q_segments, kv_segments, offsets)


def _by_query(plan: _Plan):
    """Blocks of [B, S, H, D] and [B, S] along the grid, whole [B, T, K, D] and [B, T], and blocks of [B, H, S]."""
    a_block = pl.BlockSpec((None, plan.block_q, None, plan.head), lambda i, h, b: (b, i, h, 0))
    all_keys = pl.BlockSpec((None, plan.M * plan.block_kv, None, plan.head), lambda i, h, b: (b, 0, h // plan.G, 0))
    ids = pl.BlockSpec((None, plan.block_q), lambda i, h, b: (b, i))
    all_ids = pl.BlockSpec((None, plan.M * plan.block_kv), lambda i, h, b: (b, 0))
    sums = pl.BlockSpec((None, plan.block_q, None), lambda i, h, b: (b, i, h))
    return a_block, all_keys, ids, all_ids, sums


def forward(spec, q, k, v, q_segments, kv_segments, offsets):
    """(out [B, S, H, D], logsumexp [B, S, H])."""
    plan = _plan(spec, q, k, "forward")
    q_ids, kv_ids, found = _prepare(spec, plan, q_segments, kv_segments, offsets)
    a_block, all_keys, ids, all_ids, sums = _by_query(plan)
    length = plan.N * plan.block_q
    out, lse = _call(
        _forward_kernel,
        spec,
        plan,
        "segment_attention_forward",
        (plan.N, plan.H, plan.B),
        blocks.list_visits(*found, plan.visits, fill=False),
        offsets,
        (plan.queries(q), plan.keys(k), plan.keys(v), q_ids, kv_ids),
        [a_block, all_keys, all_keys, ids, all_ids],
        [
            ((plan.B, length, plan.H, plan.head), q.dtype, a_block),
            ((plan.B, length, plan.H), jnp.float32, sums),
        ],
    )
    return out[:, : plan.S, :, : plan.D], lse[:, : plan.S]


def backward(spec, q, k, v, q_segments, kv_segments, offsets, out, logsumexp, d_out, d_logsumexp):
    """(dq, dk, dv) from what the forward pass left."""
    lse, delta = normalisers(out, logsumexp, d_out, d_logsumexp, -_LOWEST)
    operands = q, k, v, d_out.astype(q.dtype), lse, delta, q_segments, kv_segments, offsets
    return d_queries(spec, *operands), *d_keys(spec, *operands)


def d_queries(spec, q, k, v, d_out, lse, delta, q_segments, kv_segments, offsets):
    """Gradient of the queries [B, S, H, D]."""
    plan = _plan(spec, q, k, "d_queries")
    q_ids, kv_ids, found = _prepare(spec, plan, q_segments, kv_segments, offsets)
    a_block, all_keys, ids, all_ids, sums = _by_query(plan)
    (d_q,) = _call(
        _d_queries_kernel,
        spec,
        plan,
        "segment_attention_d_queries",
        (plan.N, plan.H, plan.B),
        blocks.list_visits(*found, plan.visits, fill=False),
        offsets,
        _backward_operands(plan, q, k, v, d_out, lse, delta, q_ids, kv_ids),
        [a_block, all_keys, all_keys, a_block, sums, sums, ids, all_ids],
        [((plan.B, plan.N * plan.block_q, plan.H, plan.head), q.dtype, a_block)],
    )
    return d_q[:, : plan.S, :, : plan.D]


def d_keys(spec, q, k, v, d_out, lse, delta, q_segments, kv_segments, offsets):
    """Gradients of keys and values [B, T, K, D]."""
    plan = _plan(spec, q, k, "d_keys")
    q_ids, kv_ids, found = _prepare(spec, plan, q_segments, kv_segments, offsets)
    length, keys = plan.N * plan.block_q, plan.M * plan.block_kv
    a_block = pl.BlockSpec((None, plan.block_kv, None, plan.head), lambda j, h, b: (b, j, h, 0))
    group = pl.BlockSpec((None, length, plan.G, plan.head), lambda j, h, b: (b, 0, h, 0))
    sums = pl.BlockSpec((None, length, plan.G), lambda j, h, b: (b, 0, h))
    all_ids = pl.BlockSpec((None, length), lambda j, h, b: (b, 0))
    ids = pl.BlockSpec((None, plan.block_kv), lambda j, h, b: (b, j))
    found = _call(
        _d_keys_kernel,
        spec,
        plan,
        "segment_attention_d_keys",
        (plan.M, plan.K, plan.B),
        blocks.list_visits(*blocks.transposed(found), plan.visits, fill=False),
        offsets,
        _backward_operands(plan, q, k, v, d_out, lse, delta, q_ids, kv_ids),
        [group, a_block, a_block, group, sums, sums, all_ids, ids],
        [((plan.B, keys, plan.K, plan.head), x.dtype, a_block) for x in (k, v)],
    )
    return tuple(x[:, : plan.T, :, : plan.D] for x in found)


def _backward_operands(plan: _Plan, q, k, v, d_out, lse, delta, q_ids, kv_ids):
    queries = [plan.queries(x) for x in (d_out, lse, delta)]
    return plan.queries(q), plan.keys(k), plan.keys(v), *queries, q_ids, kv_ids

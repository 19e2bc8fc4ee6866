"""Segment attention on NVIDIA GPUs: Pallas (Triton) kernels that compute only the needed pairs of blocks.

One program computes one block row of one head: a block of queries, or of keys for their gradients. It loops over the
work items of its block row (`jvlm_kernels.attention.block_pairs`), so other pairs cost neither launches nor loop steps.
Online softmax and the recomputing backward pass are those of FlashAttention-2 (arXiv 2307.08691).

Shapes: B batch rows, N query blocks, M key blocks, D head size, which is read and multiplied in chunks that are powers
of two.
"""

from __future__ import annotations

import functools
import struct

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jvlm_kernels import shapes
from jvlm_kernels.attention import block_pairs, tuning
from jvlm_kernels.attention.block_plan import PaddedBlockPlan, check_dtypes, logsumexp_and_delta, padded_segment_ids
from jvlm_kernels.constants import LOG2E, NEG_INF
from jvlm_kernels.errors import Unavailable

PLATFORM = "cuda"
_MAX_HEAD_SIZE = 256


def check(spec, q, k, v) -> None:
    """Raise `Unavailable` for a call that the kernels cannot run."""
    check_dtypes(q, k, v, jnp.float32, jnp.bfloat16, jnp.float16)
    if q.shape[-1] > _MAX_HEAD_SIZE:
        raise Unavailable(f"a head of {q.shape[-1]} does not fit shared memory; at most {_MAX_HEAD_SIZE}")
    if spec.scale <= 0:
        raise Unavailable(f"takes a positive scale, got {spec.scale}")
    for kernel in tuning.CUDA_KERNELS:
        _plan(spec, q, k, kernel)


def _plan(spec, q, k, kernel: str) -> _TritonPlan:
    return _TritonPlan.of(spec, q, k, tuning.cuda_blocks(spec, q, k, kernel))


class _TritonPlan(PaddedBlockPlan):
    """Sizes of a call, and the layout of the kernels' operands."""

    @property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """(start, size) of the chunks in which a head is read and multiplied; see `head_chunks`.

        float32 gets a single chunk: its products take three instructions each, and two would spill registers.
        """
        return head_chunks(self.D) if self.itemsize == 2 else ((0, max(16, 1 << (self.D - 1).bit_length())),)

    @property
    def head(self) -> int:
        """Head size after padding."""
        return sum(size for _, size in self.chunks)

    @property
    def params(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(num_warps=self.sizes.warps, num_stages=2)


def head_chunks(size: int) -> tuple[tuple[int, int], ...]:
    """Return one or two chunks (start, size) that hold a head: 128, or 64 + 16 for a head of 80, or 64 + 32 for 96.

    Triton multiplies matrices whose sides are powers of two, from 16 on; a head of 80 padded to 128 would read and
    multiply three fifths more.
    """
    whole = max(16, 1 << (size - 1).bit_length())
    half = whole // 2
    rest = max(16, 1 << max(size - half - 1, 0).bit_length())
    return ((0, whole),) if half < 16 or rest >= half else ((0, half), (half, rest))


def _load(plan: _TritonPlan, ref, *index) -> tuple:
    """BlockSizes [..., size] of each part of the head."""
    return tuple(ref[(*index, slice(start, start + size))] for start, size in plan.chunks)


def _store(plan: _TritonPlan, ref, values, factor: float = 1.0) -> None:
    for (start, size), value in zip(plan.chunks, values, strict=True):
        ref[:, start : start + size] = (value * factor).astype(ref.dtype)


def _zeros(plan: _TritonPlan, rows: int) -> tuple:
    return tuple(jnp.zeros((rows, size), jnp.float32) for _, size in plan.chunks)


def _dot(spec, a, b, **transposed):
    """Return the matrix product, accumulated in float32; float32 operands take three TensorFloat-32 products."""
    precision = None
    if a.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST if spec.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return plgpu.dot(a, b, precision=precision, **transposed)


def _dot_heads(spec, a: tuple, b: tuple):
    """Return a @ b.T for [X, head] and [Y, head] in chunks: [X, Y]."""
    return sum(_dot(spec, x, y, trans_b=True) for x, y in zip(a, b, strict=True))


def _exp2(spec, x, factor: float, minus):
    """Return 2 ** (x * factor - minus), ``minus`` broadcast to ``x``; subnormal results are flushed to 0.

    It takes two instructions for each score; without a fused multiply-add and with subnormals it would take seven.
    """
    if spec.interpret:
        return jnp.exp2(x * factor - minus)
    constant = "0f" + struct.pack(">f", factor).hex()
    (result,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 t; fma.rn.ftz.f32 t, $1, {constant}, $2; ex2.approx.ftz.f32 $0, t; }}",
        args=[x, jnp.broadcast_to(-minus, x.shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result


def _visible(spec, q_ids, kv_ids, q_first, kv_first, *, q_axis: int = 0):
    """Return the mask [block_q, block_kv], or [block_kv, block_q] with ``q_axis`` 1."""
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
    """Return unscaled scores, -inf where masked out; ``mask()`` is called for partial pairs only."""
    return lax.cond(
        block_pairs.is_full(item),
        lambda products: products,
        lambda products: jnp.where(mask(), products, -jnp.inf),
        _dot_heads(spec, rows, columns),
    )


def _forward_kernel(spec, plan: _TritonPlan, items, starts, offsets, q, k, v, q_ids, kv_ids, out, lse):
    i, batch_row = pl.program_id(0), pl.program_id(2)
    block_row = batch_row * plan.N + i
    queries = _load(plan, q, slice(None))
    q_first = i * plan.block_q + offsets[batch_row]
    factor = spec.scale * LOG2E  # so that exp2 is the exponential

    def step(index, carry):
        running_max, running_sum, acc = carry
        item = items[index]
        kv_first = block_pairs.block_column(item) * plan.block_kv
        keys = pl.ds(kv_first, plan.block_kv)
        scores = _scores(
            spec,
            item,
            queries,
            _load(plan, k, keys),
            lambda: _visible(spec, q_ids[...], kv_ids[keys], q_first, kv_first),
        )
        new_max = jnp.maximum(running_max, scores.max(1) * factor)
        weights, rescale = _exp2(spec, scores, factor, new_max[:, None]), _exp2(spec, running_max, 1.0, new_max)
        values = _load(plan, v, keys)
        low_precision = weights.astype(v.dtype)
        acc = tuple(a * rescale[:, None] + _dot(spec, low_precision, x) for a, x in zip(acc, values, strict=True))
        return new_max, running_sum * rescale + weights.sum(1), acc

    zeros = jnp.zeros((plan.block_q,), jnp.float32)
    start = zeros + NEG_INF, zeros, _zeros(plan, plan.block_q)
    running_max, running_sum, acc = lax.fori_loop(starts[block_row], starts[block_row + 1], step, start)
    attends = running_sum > 0
    divisor = jnp.where(attends, running_sum, 1.0)
    _store(plan, out, [a / divisor[:, None] for a in acc])
    lse[...] = jnp.where(attends, (running_max + jnp.log2(divisor)) / LOG2E, -jnp.inf)


def _d_queries_kernel(spec, plan: _TritonPlan, items, starts, offsets, q, k, v, d_out, lse, delta, q_ids, kv_ids, d_q):
    i, batch_row = pl.program_id(0), pl.program_id(2)
    block_row = batch_row * plan.N + i
    queries, d_outs = _load(plan, q, slice(None)), _load(plan, d_out, slice(None))
    lse2, deltas = lse[...] * LOG2E, delta[...]
    q_first = i * plan.block_q + offsets[batch_row]

    def step(index, acc):
        item = items[index]
        kv_first = block_pairs.block_column(item) * plan.block_kv
        rows = pl.ds(kv_first, plan.block_kv)
        keys = _load(plan, k, rows)
        scores = _scores(spec, item, queries, keys, lambda: _visible(spec, q_ids[...], kv_ids[rows], q_first, kv_first))
        weights = _exp2(spec, scores, spec.scale * LOG2E, lse2[:, None])
        d_scores = weights * (_dot_heads(spec, d_outs, _load(plan, v, rows)) - deltas[:, None])
        low = d_scores.astype(k.dtype)
        return tuple(a + _dot(spec, low, x) for a, x in zip(acc, keys, strict=True))

    acc = lax.fori_loop(starts[block_row], starts[block_row + 1], step, _zeros(plan, plan.block_q))
    _store(plan, d_q, acc, spec.scale)


def _d_keys_kernel(
    spec, plan: _TritonPlan, items, starts, offsets, q, k, v, d_out, lse, delta, q_ids, kv_ids, d_k, d_v
):
    j, batch_row = pl.program_id(0), pl.program_id(2)
    block_row = batch_row * plan.M + j
    keys, values = _load(plan, k, slice(None)), _load(plan, v, slice(None))
    kv_first = j * plan.block_kv

    def one_query_head(g, acc):
        def step(index, carry):
            acc_k, acc_v = carry
            item = items[index]
            q_start = block_pairs.block_column(item) * plan.block_q
            rows = pl.ds(q_start, plan.block_q)
            queries, d_outs = _load(plan, q, rows, g), _load(plan, d_out, rows, g)
            q_first = q_start + offsets[batch_row]
            # keys along the rows: the weights multiply d_outs and queries from registers as they are
            scores = _scores(
                spec, item, keys, queries, lambda: _visible(spec, q_ids[rows], kv_ids[...], q_first, kv_first, q_axis=1)
            )
            weights = _exp2(spec, scores, spec.scale * LOG2E, lse[rows, g][None, :] * LOG2E)
            d_scores = weights * (_dot_heads(spec, values, d_outs) - delta[rows, g][None, :])
            low, low_d = weights.astype(d_out.dtype), d_scores.astype(q.dtype)
            return (
                tuple(a + _dot(spec, low_d, x) for a, x in zip(acc_k, queries, strict=True)),
                tuple(a + _dot(spec, low, x) for a, x in zip(acc_v, d_outs, strict=True)),
            )

        return lax.fori_loop(starts[block_row], starts[block_row + 1], step, acc)

    start = _zeros(plan, plan.block_kv), _zeros(plan, plan.block_kv)
    acc_k, acc_v = lax.fori_loop(0, plan.G, one_query_head, start)
    _store(plan, d_k, acc_k, spec.scale)
    _store(plan, d_v, acc_v)


def _call(kernel, spec, plan: _TritonPlan, name: str, grid, pairs, offsets, operands, in_specs, outputs):
    """Launch over ``grid`` (block rows, heads, batch rows); ``outputs`` are (shape, dtype, BlockSpec)."""
    whole = [pl.BlockSpec(x.shape, lambda *_: (0,)) for x in (pairs.items, pairs.starts, offsets)]
    return pl.pallas_call(
        functools.partial(kernel, spec, plan),
        out_shape=[shapes.result_type(shape, dtype, operands) for shape, dtype, _ in outputs],
        grid=grid,
        in_specs=[*whole, *in_specs],
        out_specs=[block for _, _, block in outputs],
        compiler_params=plan.params,
        interpret=spec.interpret,
        name=name,
    )(pairs.items, pairs.starts, offsets, *operands)


def _prepare(spec, plan: _TritonPlan, q_segments, kv_segments, offsets):
    """Return segment ids padded to whole blocks, and the block mask."""
    q_ids, kv_ids = padded_segment_ids(q_segments, kv_segments, plan.N * plan.block_q, plan.M * plan.block_kv)
    return q_ids, kv_ids, plan.block_mask(spec, q_segments, kv_segments, offsets)


def _by_query(plan: _TritonPlan):
    """BlockSizes of [B, S, H, D] and [B, S] along the grid, whole [B, T, K, D] and [B, T], and blocks of [B, H, S]."""
    a_block = pl.BlockSpec((None, plan.block_q, None, plan.head), lambda i, h, b: (b, i, h, 0))
    all_keys = pl.BlockSpec((None, plan.M * plan.block_kv, None, plan.head), lambda i, h, b: (b, 0, h // plan.G, 0))
    ids = pl.BlockSpec((None, plan.block_q), lambda i, h, b: (b, i))
    all_ids = pl.BlockSpec((None, plan.M * plan.block_kv), lambda i, h, b: (b, 0))
    statistics = pl.BlockSpec((None, plan.block_q, None), lambda i, h, b: (b, i, h))
    return a_block, all_keys, ids, all_ids, statistics


def forward(spec, q, k, v, q_segments, kv_segments, offsets):
    """Return (out [B, S, H, D], logsumexp [B, S, H])."""
    plan = _plan(spec, q, k, "forward")
    q_ids, kv_ids, mask = _prepare(spec, plan, q_segments, kv_segments, offsets)
    a_block, all_keys, ids, all_ids, statistics = _by_query(plan)
    length = plan.N * plan.block_q
    out, lse = _call(
        _forward_kernel,
        spec,
        plan,
        "segment_attention_forward",
        (plan.N, plan.H, plan.B),
        block_pairs.list_pairs(*mask, plan.max_pairs, cover_empty_rows=False),
        offsets,
        (plan.queries(q), plan.keys(k), plan.keys(v), q_ids, kv_ids),
        [a_block, all_keys, all_keys, ids, all_ids],
        [
            ((plan.B, length, plan.H, plan.head), q.dtype, a_block),
            ((plan.B, length, plan.H), jnp.float32, statistics),
        ],
    )
    return out[:, : plan.S, :, : plan.D], lse[:, : plan.S]


def backward(spec, q, k, v, q_segments, kv_segments, offsets, out, logsumexp, d_out, d_logsumexp):
    """Return (dq, dk, dv) from the residuals of the forward pass."""
    lse, delta = logsumexp_and_delta(out, logsumexp, d_out, d_logsumexp, -NEG_INF)
    operands = q, k, v, d_out.astype(q.dtype), lse, delta, q_segments, kv_segments, offsets
    return d_queries(spec, *operands), *d_keys(spec, *operands)


def d_queries(spec, q, k, v, d_out, lse, delta, q_segments, kv_segments, offsets):
    """Return the gradient of the queries [B, S, H, D]."""
    plan = _plan(spec, q, k, "d_queries")
    q_ids, kv_ids, mask = _prepare(spec, plan, q_segments, kv_segments, offsets)
    a_block, all_keys, ids, all_ids, statistics = _by_query(plan)
    (d_q,) = _call(
        _d_queries_kernel,
        spec,
        plan,
        "segment_attention_d_queries",
        (plan.N, plan.H, plan.B),
        block_pairs.list_pairs(*mask, plan.max_pairs, cover_empty_rows=False),
        offsets,
        _backward_operands(plan, q, k, v, d_out, lse, delta, q_ids, kv_ids),
        [a_block, all_keys, all_keys, a_block, statistics, statistics, ids, all_ids],
        [((plan.B, plan.N * plan.block_q, plan.H, plan.head), q.dtype, a_block)],
    )
    return d_q[:, : plan.S, :, : plan.D]


def d_keys(spec, q, k, v, d_out, lse, delta, q_segments, kv_segments, offsets):
    """Return the gradients of keys and values [B, T, K, D]."""
    plan = _plan(spec, q, k, "d_keys")
    q_ids, kv_ids, mask = _prepare(spec, plan, q_segments, kv_segments, offsets)
    length, keys = plan.N * plan.block_q, plan.M * plan.block_kv
    a_block = pl.BlockSpec((None, plan.block_kv, None, plan.head), lambda j, h, b: (b, j, h, 0))
    group = pl.BlockSpec((None, length, plan.G, plan.head), lambda j, h, b: (b, 0, h, 0))
    statistics = pl.BlockSpec((None, length, plan.G), lambda j, h, b: (b, 0, h))
    all_ids = pl.BlockSpec((None, length), lambda j, h, b: (b, 0))
    ids = pl.BlockSpec((None, plan.block_kv), lambda j, h, b: (b, j))
    gradients = _call(
        _d_keys_kernel,
        spec,
        plan,
        "segment_attention_d_keys",
        (plan.M, plan.K, plan.B),
        block_pairs.list_pairs(*block_pairs.transpose(mask), plan.max_pairs, cover_empty_rows=False),
        offsets,
        _backward_operands(plan, q, k, v, d_out, lse, delta, q_ids, kv_ids),
        [group, a_block, a_block, group, statistics, statistics, all_ids, ids],
        [((plan.B, keys, plan.K, plan.head), x.dtype, a_block) for x in (k, v)],
    )
    return tuple(x[:, : plan.T, :, : plan.D] for x in gradients)


def _backward_operands(plan: _TritonPlan, q, k, v, d_out, lse, delta, q_ids, kv_ids):
    queries = [plan.queries(x) for x in (d_out, lse, delta)]
    return plan.queries(q), plan.keys(k), plan.keys(v), *queries, q_ids, kv_ids

"""Segment attention on NVIDIA GPUs: Pallas (Triton) kernels that visit only the blocks of scores that are needed.

One program computes one block of queries of one head (or of keys, for their gradients) and walks its own part of the
list of visits (`jvlm_kernels.attention.blocks`), so no launch and no loop step is spent on other blocks. Online softmax
and the recomputing backward pass are FlashAttention-2's (arXiv 2307.08691).

Shapes: B rows, N query blocks, M key blocks, D head size padded to a power of two, as Triton wants it.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jvlm_kernels import shapes
from jvlm_kernels.attention import blocks, tuning
from jvlm_kernels.attention.plan import Plan, check_dtypes, normalisers, pad_to, padded_ids
from jvlm_kernels.errors import Unavailable

PLATFORM = "cuda"
_HIDDEN, _LOWEST = -1e30, -1e20
_LOG2E = math.log2(math.e)
_LARGEST_HEAD = 256


def check(spec, q, k, v) -> None:
    """Static reasons not to run."""
    check_dtypes(q, k, v, jnp.float32, jnp.bfloat16, jnp.float16)
    if q.shape[-1] > _LARGEST_HEAD:
        raise Unavailable(f"a head of {q.shape[-1]} does not fit shared memory; at most {_LARGEST_HEAD}")
    _plan(spec, q, k)


def _plan(spec, q, k) -> _Plan:
    return _Plan.of(spec, q, k, tuning.cuda_blocks(spec, q, k))


class _Plan(Plan):
    """Sizes of a call, and the layout that the kernels want."""

    @property
    def head(self) -> int:
        """The head size that a block has."""
        return max(16, 1 << (self.D - 1).bit_length())

    def queries(self, x):
        """Padded to whole blocks, and the last axis of four to whole heads."""
        return self._padded(x, self.N * self.block_q)

    def keys(self, x):
        """As `queries`, for keys and values."""
        return self._padded(x, self.M * self.block_kv)

    def _padded(self, x, length: int):
        x = pad_to(x, 1, length)
        return pad_to(x, 3, self.head) if x.ndim == 4 else x

    @property
    def params(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(num_warps=4 if self.head <= 64 else 8, num_stages=2)


def _dot(a, b, **transposed):
    """Matrix product summed in float32; float32 operands are not rounded to TensorFloat-32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, precision=precision, **transposed)


def _visible(spec, q_ids, kv_ids, q_first, kv_first):
    """Mask [block_q, block_kv]."""
    mask = q_ids[:, None] == kv_ids[None, :]
    if spec.causal or spec.window is not None:
        q_index = q_first + lax.broadcasted_iota(jnp.int32, mask.shape, 0)
        distance = q_index - (kv_first + lax.broadcasted_iota(jnp.int32, mask.shape, 1))
        if spec.causal:
            mask &= distance >= 0
        if spec.window is not None:
            mask &= jnp.abs(distance) < spec.window
    return mask


def _scores(spec, q, k, mask):
    """Scores in units of log 2, so that exp2 is the exponential; hidden ones low."""
    return jnp.where(mask, _dot(q, k, trans_b=True) * (spec.scale * _LOG2E), _HIDDEN)


def _forward_kernel(spec, plan: _Plan, items, starts, offsets, q, k, v, q_ids, kv_ids, out, lse):
    i, row = pl.program_id(0), pl.program_id(2)
    line = row * plan.N + i
    queries, ids = q[...], q_ids[...]
    q_first = i * plan.block_q + offsets[row]

    def step(visit, carry):
        top, total, sums = carry
        kv_first = blocks.partner_of(items[visit]) * plan.block_kv
        keys = pl.ds(kv_first, plan.block_kv)
        scores = _scores(spec, queries, k[keys, :], _visible(spec, ids, kv_ids[keys], q_first, kv_first))
        now = jnp.maximum(top, scores.max(1))
        weights, shrink = jnp.exp2(scores - now[:, None]), jnp.exp2(top - now)
        sums = sums * shrink[:, None] + _dot(weights.astype(v.dtype), v[keys, :])
        return now, total * shrink + weights.sum(1), sums

    zeros = jnp.zeros((plan.block_q,), jnp.float32)
    start = zeros + _LOWEST, zeros, jnp.zeros((plan.block_q, plan.head), jnp.float32)
    top, total, sums = lax.fori_loop(starts[line], starts[line + 1], step, start)
    seen = total > 0
    divisor = jnp.where(seen, total, 1.0)
    out[...] = (sums / divisor[:, None]).astype(out.dtype)
    lse[...] = jnp.where(seen, (top + jnp.log2(divisor)) / _LOG2E, -jnp.inf)


def _d_queries_kernel(spec, plan: _Plan, items, starts, offsets, q, k, v, d_out, lse, delta, q_ids, kv_ids, d_q):
    i, row = pl.program_id(0), pl.program_id(2)
    line = row * plan.N + i
    queries, ids, d_outs = q[...], q_ids[...], d_out[...]
    lse2, deltas = lse[...] * _LOG2E, delta[...]
    q_first = i * plan.block_q + offsets[row]

    def step(visit, sums):
        kv_first = blocks.partner_of(items[visit]) * plan.block_kv
        keys = pl.ds(kv_first, plan.block_kv)
        scores = _scores(spec, queries, k[keys, :], _visible(spec, ids, kv_ids[keys], q_first, kv_first))
        weights = jnp.exp2(scores - lse2[:, None])
        d_scores = weights * (_dot(d_outs, v[keys, :], trans_b=True) - deltas[:, None]) * spec.scale
        return sums + _dot(d_scores.astype(k.dtype), k[keys, :])

    none = jnp.zeros((plan.block_q, plan.head), jnp.float32)
    d_q[...] = lax.fori_loop(starts[line], starts[line + 1], step, none).astype(d_q.dtype)


def _d_keys_kernel(spec, plan: _Plan, items, starts, offsets, q, k, v, d_out, lse, delta, q_ids, kv_ids, d_k, d_v):
    j, row = pl.program_id(0), pl.program_id(2)
    line = row * plan.M + j
    keys, values, ids = k[...], v[...], kv_ids[...]
    kv_first = j * plan.block_kv

    def step_of(g: int):
        def step(visit, carry):
            sums_k, sums_v = carry
            place = blocks.partner_of(items[visit]) * plan.block_q
            rows = pl.ds(place, plan.block_q)
            queries, d_outs = q[rows, g, :], d_out[rows, g, :]
            mask = _visible(spec, q_ids[rows], ids, place + offsets[row], kv_first)
            weights = jnp.exp2(_scores(spec, queries, keys, mask) - lse[rows, g][:, None] * _LOG2E)
            sums_v += _dot(weights.astype(d_outs.dtype), d_outs, trans_a=True)
            d_scores = weights * (_dot(d_outs, values, trans_b=True) - delta[rows, g][:, None]) * spec.scale
            return sums_k + _dot(d_scores.astype(queries.dtype), queries, trans_a=True), sums_v

        return step

    none = jnp.zeros((plan.block_kv, plan.head), jnp.float32)
    sums = none, none
    for g in range(plan.G):
        sums = lax.fori_loop(starts[line], starts[line + 1], step_of(g), sums)
    d_k[...], d_v[...] = sums[0].astype(d_k.dtype), sums[1].astype(d_v.dtype)


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
    plan = _plan(spec, q, k)
    q_ids, kv_ids, found = _prepare(spec, plan, q_segments, kv_segments, offsets)
    visits = blocks.list_visits(*found, plan.visits, fill=False)
    a_block, all_keys, ids, all_ids, sums = _by_query(plan)
    length = plan.N * plan.block_q
    out, lse = _call(
        _forward_kernel,
        spec,
        plan,
        "segment_attention_forward",
        (plan.N, plan.H, plan.B),
        visits,
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
    plan = _plan(spec, q, k)
    q_ids, kv_ids, found = _prepare(spec, plan, q_segments, kv_segments, offsets)
    lse, delta = normalisers(out, logsumexp, d_out, d_logsumexp, -_LOWEST)
    operands = (
        *(plan.queries(q), plan.keys(k), plan.keys(v), plan.queries(d_out.astype(q.dtype))),
        *(plan.queries(lse), plan.queries(delta)),
        *(q_ids, kv_ids),
    )
    a_block, all_keys, ids, all_ids, sums = _by_query(plan)
    length, keys = plan.N * plan.block_q, plan.M * plan.block_kv
    (d_q,) = _call(
        _d_queries_kernel,
        spec,
        plan,
        "segment_attention_d_queries",
        (plan.N, plan.H, plan.B),
        blocks.list_visits(*found, plan.visits, fill=False),
        offsets,
        operands,
        [a_block, all_keys, all_keys, a_block, sums, sums, ids, all_ids],
        [((plan.B, length, plan.H, plan.head), q.dtype, a_block)],
    )
    a_block = pl.BlockSpec((None, plan.block_kv, None, plan.head), lambda j, h, b: (b, j, h, 0))
    group = pl.BlockSpec((None, length, plan.G, plan.head), lambda j, h, b: (b, 0, h, 0))
    sums = pl.BlockSpec((None, length, plan.G), lambda j, h, b: (b, 0, h))
    all_ids = pl.BlockSpec((None, length), lambda j, h, b: (b, 0))
    ids = pl.BlockSpec((None, plan.block_kv), lambda j, h, b: (b, j))
    d_k, d_v = _call(
        _d_keys_kernel,
        spec,
        plan,
        "segment_attention_d_keys",
        (plan.M, plan.K, plan.B),
        blocks.list_visits(*blocks.transposed(found), plan.visits, fill=False),
        offsets,
        operands,
        [group, a_block, a_block, group, sums, sums, all_ids, ids],
        [((plan.B, keys, plan.K, plan.head), x.dtype, a_block) for x in (k, v)],
    )
    return tuple(x[:, : plan.T, :, : plan.D] if x is not d_q else x[:, : plan.S, :, : plan.D] for x in (d_q, d_k, d_v))

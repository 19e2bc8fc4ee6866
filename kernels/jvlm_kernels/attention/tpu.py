"""Segment attention on TPU: Pallas (Mosaic) kernels that compute only the needed pairs of blocks.

The work items (`jvlm_kernels.attention.block_pairs`) are prefetched into scalar memory and form the inner axis of the
grid, whose length is known only at run time, so other pairs cost neither arithmetic nor grid steps. Online softmax and
the recomputing backward pass are those of FlashAttention-2 (arXiv 2307.08691).

The G query heads that share a key head form one matrix of G * block_q queries. Shapes: B batch rows, K key heads,
N query blocks, M key blocks, Q = G * block_q, D head size padded to the 128 lanes.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jvlm_kernels import shapes
from jvlm_kernels.attention import block_pairs, tuning
from jvlm_kernels.attention.block_plan import BlockPlan, check_dtypes, logsumexp_and_delta, pad_to, padded_segment_ids
from jvlm_kernels.constants import LANES, MASK_VALUE, NEG_INF
from jvlm_kernels.errors import Unavailable
from jvlm_kernels.tpu_common import VMEM_BYTES, OnlineSoftmax, dot

PLATFORM = "tpu"
_MAX_ITEM_BYTES = 512 * 1024  # of scalar memory, for the work items


def check(spec, q, k, v) -> None:
    """Raise `Unavailable` for a call that the kernels cannot run."""
    check_dtypes(q, k, v, jnp.float32, jnp.bfloat16)
    plan = _plan(spec, q, k)
    if plan.max_pairs * 4 > _MAX_ITEM_BYTES:
        raise Unavailable(f"{plan.max_pairs} work items do not fit into scalar memory")


def _plan(spec, q, k) -> _TpuPlan:
    return _TpuPlan.of(spec, q, k, tuning.tpu_blocks(spec, q, k))


class _TpuPlan(BlockPlan):
    """Sizes of a call, and the layout of the kernels' operands."""

    @property
    def Q(self) -> int:
        return self.G * self.block_q

    @property
    def lanes(self) -> int:
        return -(-self.D // LANES) * LANES

    def queries(self, x):
        """Reshape [B, S, H, ...] to [B, K, N, Q, ...], padded."""
        x = pad_to(x, 1, self.N * self.block_q)
        x = x.reshape(self.B, self.N, self.block_q, self.K, self.G, *x.shape[3:])
        x = jnp.moveaxis(x, (3, 4), (1, 3))
        return x.reshape(self.B, self.K, self.N, self.Q, *x.shape[5:])

    def from_queries(self, x):
        """Invert `queries`."""
        x = x.reshape(self.B, self.K, self.N, self.G, self.block_q, *x.shape[4:])
        x = jnp.moveaxis(x, (1, 3), (3, 4))
        return x.reshape(self.B, self.N * self.block_q, self.H, *x.shape[5:])[:, : self.S]

    def keys(self, x):
        """Reshape [B, T, K, D] to [B, K, M, block_kv, D], padded."""
        x = pad_to(x, 1, self.M * self.block_kv).reshape(self.B, self.M, self.block_kv, self.K, -1)
        return jnp.moveaxis(x, 3, 1)

    def from_keys(self, x):
        """Invert `keys`."""
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(self.B, self.M * self.block_kv, self.K, -1)[:, : self.T, :, : self.D]

    def pad_head(self, x):
        """Pad the head size to whole lanes."""
        return pad_to(x, -1, self.lanes)


def _column(row):
    """Transpose [1, X] to [X, LANES], every lane the same."""
    return jnp.broadcast_to(row, (LANES, row.shape[-1])).T


def _visible(spec, plan: _TpuPlan, q_ids, kv_ids, q_first, kv_first, *, keys_first: bool):
    """Return the mask of a pair: [block_q, block_kv], or with ``keys_first`` [block_kv, Q]."""
    mask = q_ids == kv_ids
    if spec.causal or spec.window is not None:
        q_axis = 1 if keys_first else 0
        q_index = lax.rem(lax.broadcasted_iota(jnp.int32, mask.shape, q_axis), plan.block_q) + q_first
        distance = q_index - (lax.broadcasted_iota(jnp.int32, mask.shape, 1 - q_axis) + kv_first)
        if spec.causal:
            mask &= distance >= 0
        if spec.window is not None:
            mask &= jnp.abs(distance) < spec.window
    return mask


def _for_kind(item, step) -> None:
    """Run ``step(masked)`` for a full or a partial pair, and nothing for an empty item."""
    pl.when(block_pairs.is_full(item))(lambda: step(False))
    pl.when(block_pairs.is_partial(item))(lambda: step(True))


def _scores_by_query(spec, plan, q, k, q_column, kv_ids, q_first, kv_first, masked: bool):
    """Return scaled scores [Q, block_kv]."""
    scores = dot(q, k, (1, 1)) * spec.scale
    if not masked:
        return scores
    mask = _visible(spec, plan, q_column, kv_ids, q_first, kv_first, keys_first=False)
    scores = scores.reshape(plan.G, plan.block_q, plan.block_kv)
    return jnp.where(mask[None], scores, MASK_VALUE).reshape(plan.Q, plan.block_kv)


def _query_step(plan: _TpuPlan, items, offsets):
    """Return (work item, number of the key block, index of the first query among the keys) of this grid step."""
    item = items[pl.program_id(1)]
    row = block_pairs.block_row(item)
    return item, block_pairs.block_column(item), lax.rem(row, plan.N) * plan.block_q + offsets[lax.div(row, plan.N)]


def _forward_kernel(spec, plan: _TpuPlan, items, offsets, q, k, v, q_ids, kv_ids, out, lse, column, *scratch):
    item, j, q_first = _query_step(plan, items, offsets)

    softmax = OnlineSoftmax(*scratch)

    @pl.when(block_pairs.is_first(item))
    def begin():
        column[...] = _column(q_ids[...])
        softmax.reset()

    def step(masked: bool):
        for h in range(plan.heads):
            scores = _scores_by_query(
                spec, plan, q[h], k[h], column[:, :1], kv_ids[...], q_first, j * plan.block_kv, masked
            )
            softmax.update(h, scores, v[h])

    _for_kind(item, step)

    @pl.when(block_pairs.is_last(item))
    def end():
        for h in range(plan.heads):
            mean, logsumexp = softmax.result(h)
            out[h], lse[h] = mean.astype(out.dtype), logsumexp.T[:1]


def _d_queries_kernel(
    spec,
    plan: _TpuPlan,
    items,
    offsets,
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    q_ids,
    kv_ids,
    d_q,
    column,
    lse_col,
    delta_col,
    acc,
):
    item, j, q_first = _query_step(plan, items, offsets)

    @pl.when(block_pairs.is_first(item))
    def begin():
        column[...] = _column(q_ids[...])
        for h in range(plan.heads):
            lse_col[h], delta_col[h] = _column(lse[h]), _column(delta[h])
        acc[...] = jnp.zeros_like(acc)

    def step(masked: bool):
        for h in range(plan.heads):
            scores = _scores_by_query(
                spec, plan, q[h], k[h], column[:, :1], kv_ids[...], q_first, j * plan.block_kv, masked
            )
            weights = jnp.exp(scores - lse_col[h, :, :1])
            d_weights = dot(d_out[h], v[h], (1, 1))
            d_scores = weights * (d_weights - delta_col[h, :, :1]) * spec.scale
            acc[h] += dot(d_scores.astype(k.dtype), k[h], (1, 0))

    _for_kind(item, step)

    @pl.when(block_pairs.is_last(item))
    def end():
        d_q[...] = acc[...].astype(d_q.dtype)


def _d_keys_kernel(
    spec, plan: _TpuPlan, items, offsets, q, k, v, d_out, lse, delta, q_ids, kv_ids, d_k, d_v, column, acc_k, acc_v
):
    item = items[pl.program_id(1)]
    row, i = block_pairs.block_row(item), block_pairs.block_column(item)
    q_first = i * plan.block_q + offsets[lax.div(row, plan.M)]

    @pl.when(block_pairs.is_first(item))
    def begin():
        column[...] = _column(kv_ids[...])
        acc_k[...] = jnp.zeros_like(acc_k)
        acc_v[...] = jnp.zeros_like(acc_v)

    def step(masked: bool):
        mask = None
        if masked:
            ids = jnp.concatenate([q_ids[...]] * plan.G, axis=1)
            kv_first = lax.rem(row, plan.M) * plan.block_kv
            mask = _visible(spec, plan, ids, column[:, :1], q_first, kv_first, keys_first=True)
        for h in range(plan.heads):
            scores = dot(k[h], q[h], (1, 1)) * spec.scale
            if masked:
                scores = jnp.where(mask, scores, MASK_VALUE)
            weights = jnp.exp(scores - lse[h])
            acc_v[h] += dot(weights.astype(d_out.dtype), d_out[h], (1, 0))
            d_weights = dot(v[h], d_out[h], (1, 1))
            d_scores = weights * (d_weights - delta[h]) * spec.scale
            acc_k[h] += dot(d_scores.astype(q.dtype), q[h], (1, 0))

    _for_kind(item, step)

    @pl.when(block_pairs.is_last(item))
    def end():
        d_k[...] = acc_k[...].astype(d_k.dtype)
        d_v[...] = acc_v[...].astype(d_v.dtype)


class _Call:
    """One kernel launch: a grid over work items, and the block specs of operands along it.

    ``rows`` says whether block rows are of "queries" or of "keys".
    """

    def __init__(self, spec, plan: _TpuPlan, pairs: block_pairs.BlockPairs, offsets, *, rows: str):
        self.spec, self.plan, self.pairs, self.offsets = spec, plan, pairs, offsets
        self._block_rows = plan.N if rows == "queries" else plan.M
        self._rows = rows

    def _block_index(self, axis: str, item):
        """Return (batch row, block) of an operand along "queries" or "keys"."""
        row = block_pairs.block_row(item)
        block = lax.rem(row, self._block_rows) if axis == self._rows else block_pairs.block_column(item)
        return lax.div(row, self._block_rows), block

    def heads(self, axis: str, *tail: int) -> pl.BlockSpec:
        """Return the block spec of an operand [B, K, N or M, *tail]."""

        def index(h, step, items, offsets):
            batch_row, block = self._block_index(axis, items[step])
            return (batch_row, h, block, *(0 for _ in tail))

        return pl.BlockSpec((None, self.plan.heads, None, *tail), index)

    def ids(self, axis: str, size: int) -> pl.BlockSpec:
        """Return the block spec of segment ids [B, N or M, 1, size]."""

        def index(h, step, items, offsets):
            batch_row, block = self._block_index(axis, items[step])
            return batch_row, block, 0, 0

        return pl.BlockSpec((None, None, 1, size), index)

    def __call__(self, kernel, name: str, operands, in_specs, out_specs, out_shapes, scratch):
        plan = self.plan
        return pl.pallas_call(
            functools.partial(kernel, self.spec, plan),
            out_shape=[shapes.result_type(shape, dtype, operands) for shape, dtype in out_shapes],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(plan.K // plan.heads, self.pairs.count),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=self.spec.interpret,
            name=name,
        )(self.pairs.items, self.offsets, *operands)


def _prepare(spec, plan: _TpuPlan, q_segments, kv_segments, offsets):
    """Return segment ids laid out in blocks, and the block mask."""
    q_ids, kv_ids = padded_segment_ids(q_segments, kv_segments, plan.N * plan.block_q, plan.M * plan.block_kv)
    q_ids = q_ids.reshape(plan.B, plan.N, 1, plan.block_q)
    kv_ids = kv_ids.reshape(plan.B, plan.M, 1, plan.block_kv)
    return q_ids, kv_ids, plan.block_mask(spec, q_segments, kv_segments, offsets)


def forward(spec, q, k, v, q_segments, kv_segments, offsets):
    """Return (out [B, S, H, D], logsumexp [B, S, H])."""
    plan = _plan(spec, q, k)
    q_ids, kv_ids, mask = _prepare(spec, plan, q_segments, kv_segments, offsets)
    call = _Call(
        spec, plan, block_pairs.list_pairs(*mask, plan.max_pairs, cover_empty_rows=True), offsets, rows="queries"
    )
    heads, Q, D = plan.heads, plan.Q, plan.lanes
    per_query, per_key = call.heads("queries", Q, D), call.heads("keys", plan.block_kv, D)
    out, lse = call(
        _forward_kernel,
        "segment_attention_forward",
        (plan.queries(plan.pad_head(q)), plan.keys(plan.pad_head(k)), plan.keys(plan.pad_head(v)), q_ids, kv_ids),
        [per_query, per_key, per_key, call.ids("queries", plan.block_q), call.ids("keys", plan.block_kv)],
        [per_query, call.heads("queries", 1, Q)],
        [
            ((plan.B, plan.K, plan.N, Q, D), q.dtype),
            ((plan.B, plan.K, plan.N, 1, Q), jnp.float32),
        ],
        [
            ((plan.block_q, LANES), jnp.int32),
            ((heads, Q, LANES), jnp.float32),
            ((heads, Q, LANES), jnp.float32),
            ((heads, Q, D), jnp.float32),
        ],
    )
    return plan.from_queries(out)[..., : plan.D], plan.from_queries(lse[:, :, :, 0])


def backward(spec, q, k, v, q_segments, kv_segments, offsets, out, logsumexp, d_out, d_logsumexp):
    """Return (dq, dk, dv) from the residuals of the forward pass."""
    plan = _plan(spec, q, k)
    q_ids, kv_ids, mask = _prepare(spec, plan, q_segments, kv_segments, offsets)
    heads, Q, D = plan.heads, plan.Q, plan.lanes
    logsumexp, delta = logsumexp_and_delta(out, logsumexp, d_out, d_logsumexp, -NEG_INF)
    residuals = [plan.queries(x)[:, :, :, None] for x in (logsumexp, delta)]
    operands = (
        plan.queries(plan.pad_head(q)),
        plan.keys(plan.pad_head(k)),
        plan.keys(plan.pad_head(v)),
        plan.queries(plan.pad_head(d_out.astype(q.dtype))),
        *residuals,
        q_ids,
        kv_ids,
    )

    def specs(call):
        per_query, per_key = call.heads("queries", Q, D), call.heads("keys", plan.block_kv, D)
        row = call.heads("queries", 1, Q)
        ids = [call.ids("queries", plan.block_q), call.ids("keys", plan.block_kv)]
        return per_query, per_key, [per_query, per_key, per_key, per_query, row, row, *ids]

    call = _Call(
        spec, plan, block_pairs.list_pairs(*mask, plan.max_pairs, cover_empty_rows=True), offsets, rows="queries"
    )
    per_query, _, in_specs = specs(call)
    (d_q,) = call(
        _d_queries_kernel,
        "segment_attention_d_queries",
        operands,
        in_specs,
        [per_query],
        [((plan.B, plan.K, plan.N, Q, D), q.dtype)],
        [
            ((plan.block_q, LANES), jnp.int32),
            ((heads, Q, LANES), jnp.float32),
            ((heads, Q, LANES), jnp.float32),
            ((heads, Q, D), jnp.float32),
        ],
    )
    pairs = block_pairs.list_pairs(*block_pairs.transpose(mask), plan.max_pairs, cover_empty_rows=True)
    call = _Call(spec, plan, pairs, offsets, rows="keys")
    _, per_key, in_specs = specs(call)
    d_k, d_v = call(
        _d_keys_kernel,
        "segment_attention_d_keys",
        operands,
        in_specs,
        [per_key, per_key],
        [((plan.B, plan.K, plan.M, plan.block_kv, D), x.dtype) for x in (k, v)],
        [
            ((plan.block_kv, LANES), jnp.int32),
            ((heads, plan.block_kv, D), jnp.float32),
            ((heads, plan.block_kv, D), jnp.float32),
        ],
    )
    return plan.from_queries(d_q)[..., : plan.D], plan.from_keys(d_k), plan.from_keys(d_v)

"""Segment attention on TPU: Pallas (Mosaic) kernels that visit only the blocks of scores that are needed.

The list of visits (`jvlm_kernels.attention.blocks`) is prefetched into scalar memory and is the inner axis of a grid
whose length is known at run time only, so neither work nor grid steps are spent on other blocks. Online softmax and
the recomputing backward pass are FlashAttention-2's (arXiv 2307.08691).

Inside, the G query heads that share a key head are laid into one matrix of G * block_q queries. Shapes: B rows, K key
heads, N query blocks, M key blocks, Q = G * block_q, D head size padded to the 128 lanes.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jvlm_kernels import shapes
from jvlm_kernels.attention import blocks, tuning
from jvlm_kernels.attention.plan import Plan, check_dtypes, normalisers, pad_to, padded_ids
from jvlm_kernels.errors import Unavailable
from jvlm_kernels.mosaic import HIDDEN, LANES, LOWEST, VMEM_BYTES, OnlineSoftmax, dot

PLATFORM = "tpu"
_VISITS_BYTES = 512 * 1024  # of scalar memory


def check(spec, q, k, v) -> None:
    """Static reasons not to run."""
    check_dtypes(q, k, v, jnp.float32, jnp.bfloat16)
    plan = _plan(spec, q, k)
    if plan.visits * 4 > _VISITS_BYTES:
        raise Unavailable(f"a list of {plan.visits} blocks does not fit into scalar memory")


def _plan(spec, q, k) -> _Plan:
    return _Plan.of(spec, q, k, tuning.tpu_blocks(spec, q, k))


class _Plan(Plan):
    """Sizes of a call, and the layout that the kernels want."""

    @property
    def Q(self) -> int:
        return self.G * self.block_q

    @property
    def lanes(self) -> int:
        return -(-self.D // LANES) * LANES

    def queries(self, x):
        """[B, S, H, ...] to [B, K, N, Q, ...], padded."""
        x = pad_to(x, 1, self.N * self.block_q)
        x = x.reshape(self.B, self.N, self.block_q, self.K, self.G, *x.shape[3:])
        x = jnp.moveaxis(x, (3, 4), (1, 3))
        return x.reshape(self.B, self.K, self.N, self.Q, *x.shape[5:])

    def from_queries(self, x):
        """The inverse of `queries`."""
        x = x.reshape(self.B, self.K, self.N, self.G, self.block_q, *x.shape[4:])
        x = jnp.moveaxis(x, (1, 3), (3, 4))
        return x.reshape(self.B, self.N * self.block_q, self.H, *x.shape[5:])[:, : self.S]

    def keys(self, x):
        """[B, T, K, D] to [B, K, M, block_kv, D], padded."""
        x = pad_to(x, 1, self.M * self.block_kv).reshape(self.B, self.M, self.block_kv, self.K, -1)
        return jnp.moveaxis(x, 3, 1)

    def from_keys(self, x):
        """The inverse of `keys`."""
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(self.B, self.M * self.block_kv, self.K, -1)[:, : self.T, :, : self.D]

    def lanes_of(self, x):
        """The head size padded to whole lanes."""
        return pad_to(x, -1, self.lanes)


def _column(row):
    """[1, X] to [X, LANES], every lane the same."""
    return jnp.broadcast_to(row, (LANES, row.shape[-1])).T


def _visible(spec, plan: _Plan, q_ids, kv_ids, q_first, kv_first, *, keys_first: bool):
    """Mask of a block: [block_q, block_kv] from a column and a row of ids, or [block_kv, Q] from a row and a column."""
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


def _for_both(item, step) -> None:
    """Run ``step(masked)``: without a mask where the whole block is visible, not at all where nothing is."""
    pl.when(blocks.is_full(item))(lambda: step(False))
    pl.when(blocks.is_masked(item))(lambda: step(True))


def _scores_by_query(spec, plan, q, k, q_column, kv_ids, q_first, kv_first, masked: bool):
    """Scaled scores [Q, block_kv]."""
    scores = dot(q, k, (1, 1)) * spec.scale
    if not masked:
        return scores
    mask = _visible(spec, plan, q_column, kv_ids, q_first, kv_first, keys_first=False)
    scores = scores.reshape(plan.G, plan.block_q, plan.block_kv)
    return jnp.where(mask[None], scores, HIDDEN).reshape(plan.Q, plan.block_kv)


def _visit_of_queries(plan: _Plan, items, offsets):
    """(item, number of the key block, place of the first query among the keys) of this grid step."""
    item = items[pl.program_id(1)]
    line = blocks.line_of(item)
    return item, blocks.partner_of(item), lax.rem(line, plan.N) * plan.block_q + offsets[lax.div(line, plan.N)]


def _forward_kernel(spec, plan: _Plan, items, offsets, q, k, v, q_ids, kv_ids, out, lse, column, *scratch):
    item, j, q_first = _visit_of_queries(plan, items, offsets)

    softmax = OnlineSoftmax(*scratch)

    @pl.when(blocks.is_first(item))
    def begin():
        column[...] = _column(q_ids[...])
        softmax.begin()

    def step(masked: bool):
        for h in range(plan.heads):
            scores = _scores_by_query(
                spec, plan, q[h], k[h], column[:, :1], kv_ids[...], q_first, j * plan.block_kv, masked
            )
            softmax.add(h, scores, v[h])

    _for_both(item, step)

    @pl.when(blocks.is_last(item))
    def end():
        for h in range(plan.heads):
            mean, logsumexp = softmax.result(h)
            out[h], lse[h] = mean.astype(out.dtype), logsumexp.T[:1]


def _d_queries_kernel(
    spec, plan: _Plan, items, offsets, q, k, v, d_out, lse, delta, q_ids, kv_ids, d_q, column, lse_col, delta_col, sums
):
    item, j, q_first = _visit_of_queries(plan, items, offsets)

    @pl.when(blocks.is_first(item))
    def begin():
        column[...] = _column(q_ids[...])
        for h in range(plan.heads):
            lse_col[h], delta_col[h] = _column(lse[h]), _column(delta[h])
        sums[...] = jnp.zeros_like(sums)

    def step(masked: bool):
        for h in range(plan.heads):
            scores = _scores_by_query(
                spec, plan, q[h], k[h], column[:, :1], kv_ids[...], q_first, j * plan.block_kv, masked
            )
            weights = jnp.exp(scores - lse_col[h, :, :1])
            d_weights = dot(d_out[h], v[h], (1, 1))
            d_scores = weights * (d_weights - delta_col[h, :, :1]) * spec.scale
            sums[h] += dot(d_scores.astype(k.dtype), k[h], (1, 0))

    _for_both(item, step)

    @pl.when(blocks.is_last(item))
    def end():
        d_q[...] = sums[...].astype(d_q.dtype)


def _d_keys_kernel(
    spec, plan: _Plan, items, offsets, q, k, v, d_out, lse, delta, q_ids, kv_ids, d_k, d_v, column, sums_k, sums_v
):
    item = items[pl.program_id(1)]
    line, i = blocks.line_of(item), blocks.partner_of(item)
    q_first = i * plan.block_q + offsets[lax.div(line, plan.M)]

    @pl.when(blocks.is_first(item))
    def begin():
        column[...] = _column(kv_ids[...])
        sums_k[...] = jnp.zeros_like(sums_k)
        sums_v[...] = jnp.zeros_like(sums_v)

    def step(masked: bool):
        mask = None
        if masked:
            ids = jnp.concatenate([q_ids[...]] * plan.G, axis=1)
            kv_first = lax.rem(line, plan.M) * plan.block_kv
            mask = _visible(spec, plan, ids, column[:, :1], q_first, kv_first, keys_first=True)
        for h in range(plan.heads):
            scores = dot(k[h], q[h], (1, 1)) * spec.scale
            if masked:
                scores = jnp.where(mask, scores, HIDDEN)
            weights = jnp.exp(scores - lse[h])
            sums_v[h] += dot(weights.astype(d_out.dtype), d_out[h], (1, 0))
            d_weights = dot(v[h], d_out[h], (1, 1))
            d_scores = weights * (d_weights - delta[h]) * spec.scale
            sums_k[h] += dot(d_scores.astype(q.dtype), q[h], (1, 0))

    _for_both(item, step)

    @pl.when(blocks.is_last(item))
    def end():
        d_k[...] = sums_k[...].astype(d_k.dtype)
        d_v[...] = sums_v[...].astype(d_v.dtype)


class _Call:
    """One kernel launch: the grid over visits, and how operands follow it."""

    def __init__(self, spec, plan: _Plan, visits: blocks.Visits, offsets, *, lines: str):
        self.spec, self.plan, self.visits, self.offsets = spec, plan, visits, offsets
        self._count = plan.N if lines == "queries" else plan.M
        self._lines = lines

    def _where(self, axis: str, item):
        """(row, block) of an operand along "queries" or "keys"."""
        line = blocks.line_of(item)
        own = lax.rem(line, self._count) if axis == self._lines else blocks.partner_of(item)
        return lax.div(line, self._count), own

    def heads(self, axis: str, *tail: int) -> pl.BlockSpec:
        """Of an operand [B, K, N or M, *tail]."""

        def index(h, step, items, offsets):
            row, block = self._where(axis, items[step])
            return (row, h, block, *(0 for _ in tail))

        return pl.BlockSpec((None, self.plan.heads, None, *tail), index)

    def ids(self, axis: str, size: int) -> pl.BlockSpec:
        """Of segment ids [B, N or M, 1, size]."""

        def index(h, step, items, offsets):
            row, block = self._where(axis, items[step])
            return row, block, 0, 0

        return pl.BlockSpec((None, None, 1, size), index)

    def __call__(self, kernel, name: str, operands, in_specs, out_specs, out_shapes, scratch):
        plan = self.plan
        return pl.pallas_call(
            functools.partial(kernel, self.spec, plan),
            out_shape=[shapes.result(shape, dtype, operands) for shape, dtype in out_shapes],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(plan.K // plan.heads, self.visits.count),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=self.spec.interpret,
            name=name,
        )(self.visits.items, self.offsets, *operands)


def _prepare(spec, plan: _Plan, q_segments, kv_segments, offsets):
    """Ids laid out in blocks, and the blocks to visit."""
    q_ids, kv_ids = padded_ids(q_segments, kv_segments, plan.N * plan.block_q, plan.M * plan.block_kv)
    q_ids = q_ids.reshape(plan.B, plan.N, 1, plan.block_q)
    kv_ids = kv_ids.reshape(plan.B, plan.M, 1, plan.block_kv)
    return q_ids, kv_ids, plan.visited(spec, q_segments, kv_segments, offsets)


def forward(spec, q, k, v, q_segments, kv_segments, offsets):
    """(out [B, S, H, D], logsumexp [B, S, H])."""
    plan = _plan(spec, q, k)
    q_ids, kv_ids, found = _prepare(spec, plan, q_segments, kv_segments, offsets)
    call = _Call(spec, plan, blocks.list_visits(*found, plan.visits, fill=True), offsets, lines="queries")
    heads, Q, D = plan.heads, plan.Q, plan.lanes
    per_query, per_key = call.heads("queries", Q, D), call.heads("keys", plan.block_kv, D)
    out, lse = call(
        _forward_kernel,
        "segment_attention_forward",
        (plan.queries(plan.lanes_of(q)), plan.keys(plan.lanes_of(k)), plan.keys(plan.lanes_of(v)), q_ids, kv_ids),
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
    """(dq, dk, dv) from what the forward pass left."""
    plan = _plan(spec, q, k)
    q_ids, kv_ids, found = _prepare(spec, plan, q_segments, kv_segments, offsets)
    heads, Q, D = plan.heads, plan.Q, plan.lanes
    logsumexp, delta = normalisers(out, logsumexp, d_out, d_logsumexp, -LOWEST)
    rows = [plan.queries(x)[:, :, :, None] for x in (logsumexp, delta)]
    operands = (
        plan.queries(plan.lanes_of(q)),
        plan.keys(plan.lanes_of(k)),
        plan.keys(plan.lanes_of(v)),
        plan.queries(plan.lanes_of(d_out.astype(q.dtype))),
        *rows,
        q_ids,
        kv_ids,
    )

    def specs(call):
        per_query, per_key = call.heads("queries", Q, D), call.heads("keys", plan.block_kv, D)
        row = call.heads("queries", 1, Q)
        ids = [call.ids("queries", plan.block_q), call.ids("keys", plan.block_kv)]
        return per_query, per_key, [per_query, per_key, per_key, per_query, row, row, *ids]

    call = _Call(spec, plan, blocks.list_visits(*found, plan.visits, fill=True), offsets, lines="queries")
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
    visits = blocks.list_visits(*blocks.transposed(found), plan.visits, fill=True)
    call = _Call(spec, plan, visits, offsets, lines="keys")
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

"""Segment attention in plain XLA operations, on every device.

There are two strategies:

- dense: all S x T scores at once, for short sequences and for decoding;
- blocked: a loop over the pairs of blocks that segments need (`jvlm_kernels.attention.block_pairs`), so memory follows
  S and time follows the segments. On CPU it is faster than the dense strategy from sequences of 256 on, because its
  blocks stay in the cache.

Blocks are small where segments are short and large where they are long: each call counts what its own segments cost in
blocks of either size.

No backward pass stores scores; all recompute them (FlashAttention, arXiv 2205.14135): on CPU that is faster than
reading them back from memory.

Shapes: B batch rows, S queries, T keys, H query heads, K key heads with G queries each, D head size, N query blocks,
M key blocks.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax

from jvlm_kernels import shapes
from jvlm_kernels.attention import block_pairs
from jvlm_kernels.attention.block_plan import BlockPlan, logsumexp_and_delta, pad_to, padded_segment_ids
from jvlm_kernels.attention.tuning import BlockSizes
from jvlm_kernels.constants import MASK_VALUE, NEG_INF

PLATFORM = None
_MAX_DENSE_SCORES = 256 * 256  # S * T
# Sizes of blocks. In sequences up to _SHORT, and where segments are promised to be short, only the smaller is compiled.
_SMALL, _LARGE, _SHORT = 64, 256, 768
# Where segments are promised to be at most as long as a small block, such as the windows of a ViT.
_WINDOWS = 32
# What a pair of blocks costs beside its scores, in scores: measured on CPU with 4 and 8 heads of 64.
_PAIR_COST = 512
# No more pairs of small blocks than this are listed for a batch row.
_MOST_PAIRS = 1 << 18


def check(spec, q, k, v) -> None:
    """Accept every call."""


def forward(spec, q, k, v, q_segments, kv_segments, offsets):
    """Return (out [B, S, H, D], logsumexp [B, S, H])."""
    if _is_dense(spec, q, k):
        return _dense_forward(spec, q, k, v, _mask_inputs(spec, q_segments, kv_segments, offsets))
    return _in_blocks(_blocked_forward, spec, q, k, v, q_segments, kv_segments, offsets)


def backward(spec, q, k, v, q_segments, kv_segments, offsets, out, logsumexp, d_out, d_logsumexp):
    """Return (dq, dk, dv) from the residuals of the forward pass."""
    residuals = out, logsumexp, d_out, d_logsumexp
    if _is_dense(spec, q, k):
        return _dense_backward(spec, q, k, v, _mask_inputs(spec, q_segments, kv_segments, offsets), *residuals)
    return _in_blocks(_blocked_backward, spec, q, k, v, q_segments, kv_segments, offsets, *residuals)


def _is_dense(spec, q, k) -> bool:
    """Whether a call gets the dense strategy; one with block sizes never does."""
    S, T = q.shape[1], k.shape[1]
    return spec.block_sizes is None and (S == 1 or S * T <= _MAX_DENSE_SCORES)


def _in_blocks(function, spec, *operands):
    """Return ``function(plan, spec, *operands)`` with the plan that costs least for the operands' segments."""
    q, k, _, q_segments, kv_segments, offsets = operands[:6]
    plans = [_BlockedPlan.of(spec, q, k, sizes) for sizes in _block_sizes(spec, q, k)]
    calls = [functools.partial(function, plan, spec) for plan in plans]
    if len(calls) == 1:
        return calls[0](*operands)

    def cost(plan: _BlockedPlan):
        needed, _ = plan.block_mask(spec, q_segments, kv_segments, offsets)
        return needed.sum(dtype=jnp.float32) * (plan.block_q * plan.block_kv + _PAIR_COST)

    cheapest = jnp.argmin(jnp.stack([cost(plan) for plan in plans]))
    return lax.switch(cheapest, calls, *operands)


def _block_sizes(spec, q, k) -> list[BlockSizes]:
    """Return the sizes to choose from: as the call asks, or the small and the large one as far as they may pay."""
    if spec.block_sizes is not None:
        return [spec.block_sizes]
    B, S, T = q.shape[0], q.shape[1], k.shape[1]
    promised = spec.max_segment_length or max(S, T)
    size = _WINDOWS if promised <= _SMALL else _SMALL
    small, large = BlockSizes(size, size), BlockSizes(_LARGE, _LARGE)
    if max(S, T) <= _SHORT:
        return [small]
    few = block_pairs.max_pairs(spec, S, T, size, size) <= _MOST_PAIRS
    if not few or not block_pairs.fits(B, -(-S // size), -(-T // size)):
        return [large]
    return [small] if promised <= _LARGE else [small, large]


def _mask_inputs(spec, q_segments, kv_segments, offsets):
    """Return (query ids, key ids, query indices, key indices) of the dense strategy."""
    q_index, kv_index = jnp.arange(q_segments.shape[1]), jnp.arange(kv_segments.shape[1])
    if spec.has_offset:
        q_index = q_index + offsets[:, None]
    return q_segments, kv_segments, q_index, kv_index


def _dense_forward(spec, q, k, v, mask_inputs):
    scores = _scores(spec, q, k, *mask_inputs)
    maximum = scores.max(-1, keepdims=True)
    attends = maximum > 0.1 * MASK_VALUE
    weights = jnp.exp(scores - maximum)
    total = weights.sum(-1)
    out = jnp.einsum("...kgst,...tkd->...skgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out * _queries_first(jnp.where(attends[..., 0], 1.0 / total, 0.0))[..., None]
    logsumexp = _queries_first(jnp.where(attends[..., 0], jnp.log(total) + maximum[..., 0], -jnp.inf))
    return out.astype(q.dtype).reshape(q.shape), logsumexp.reshape(q.shape[:-1])


def _dense_backward(spec, q, k, v, mask_inputs, out, logsumexp, d_out, d_logsumexp):
    scores = _scores(spec, q, k, *mask_inputs)
    logsumexp, delta = logsumexp_and_delta(out, logsumexp, d_out, d_logsumexp, 0.0)
    weights = jnp.exp(scores - _queries_last(_grouped(logsumexp, k))[..., None])
    d_out_SKGD = _grouped(d_out.astype(v.dtype), k, -2)
    d_v = jnp.einsum("...kgst,...skgd->...tkd", weights.astype(v.dtype), d_out_SKGD, preferred_element_type=jnp.float32)
    d_weights = jnp.einsum("...skgd,...tkd->...kgst", d_out_SKGD, v, preferred_element_type=jnp.float32)
    delta = _queries_last(_grouped(delta, k))[..., None]
    d_scores = (weights * (d_weights - delta) * spec.scale).astype(q.dtype)
    d_q = jnp.einsum("...kgst,...tkd->...skgd", d_scores, k, preferred_element_type=jnp.float32)
    d_k = jnp.einsum("...kgst,...skgd->...tkd", d_scores, _grouped(q, k, -2), preferred_element_type=jnp.float32)
    return d_q.reshape(q.shape).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _scores(spec, q, k, q_segments, kv_segments, q_index, kv_index):
    """Return scaled scores [..., K, G, S, T] in float32, `MASK_VALUE` where they are masked out."""
    scores = jnp.einsum("...skgd,...tkd->...kgst", _grouped(q, k, -2), k, preferred_element_type=jnp.float32)
    visible = _visible(spec, q_segments, kv_segments, q_index, kv_index)
    return jnp.where(visible[..., None, None, :, :], scores * spec.scale, MASK_VALUE)


def _visible(spec, q_segments, kv_segments, q_index, kv_index):
    """Return the mask [..., S, T]."""
    visible = (q_segments[..., :, None] == kv_segments[..., None, :]) & (q_segments[..., :, None] > 0)
    distance = q_index[..., :, None] - kv_index[..., None, :]
    if spec.causal:
        visible &= distance >= 0
    if spec.window is not None:
        visible &= jnp.abs(distance) < spec.window
    return visible


def _grouped(x, k, axis: int = -1):
    """Split the axis of query heads into [K, G]."""
    K, axis = k.shape[-2], axis % x.ndim
    return x.reshape(*x.shape[:axis], K, x.shape[axis] // K, *x.shape[axis + 1 :])


def _queries_first(x):
    """Transpose [..., K, G, S] to [..., S, K, G]."""
    return jnp.moveaxis(x, -1, -3)


def _queries_last(x):
    """Transpose [..., S, K, G] to [..., K, G, S]."""
    return jnp.moveaxis(x, -3, -1)


class _BlockedPlan(BlockPlan):
    """Layout of the blocked strategy, a matrix for each block and head.

    Queries are [B * N, K, G * block_q, D], keys and values [B * M, K, block_kv, D].
    """

    def queries(self, x):
        """Reshape [B, S, H, ...] to [B * N, K, G * block_q, ...]."""
        x = pad_to(x, 1, self.N * self.block_q)
        x = x.reshape(self.B * self.N, self.block_q, self.K, self.G, *x.shape[3:])
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(self.B * self.N, self.K, self.G * self.block_q, *x.shape[4:])

    def from_queries(self, x):
        """Invert `queries`."""
        x = jnp.moveaxis(x.reshape(self.B * self.N, self.K, self.G, self.block_q, *x.shape[3:]), 3, 1)
        return x.reshape(self.B, self.N * self.block_q, self.H, *x.shape[4:])[:, : self.S]

    def keys(self, x):
        """Reshape [B, T, K, D] to [B * M, K, block_kv, D]."""
        x = pad_to(x, 1, self.M * self.block_kv)
        return jnp.moveaxis(x.reshape(self.B * self.M, self.block_kv, self.K, self.D), 1, 2)

    def from_keys(self, x):
        """Invert `keys`."""
        return jnp.moveaxis(x, 2, 1).reshape(self.B, self.M * self.block_kv, self.K, self.D)[:, : self.T]


class _BlockLoop:
    """The loop over the needed pairs of blocks, and their scores."""

    def __init__(self, spec, plan: _BlockedPlan, q_segments, kv_segments, offsets):
        self.spec, self.plan, self.offsets = spec, plan, offsets
        q_ids, kv_ids = padded_segment_ids(q_segments, kv_segments, plan.N * plan.block_q, plan.M * plan.block_kv)
        self.q_ids, self.kv_ids = q_ids.reshape(-1, plan.block_q), kv_ids.reshape(-1, plan.block_kv)
        mask = plan.block_mask(spec, q_segments, kv_segments, offsets)
        self.pairs = block_pairs.list_pairs(*mask, plan.max_pairs, cover_empty_rows=False)

    def scores(self, block_row, column, q, k):
        """Return scaled scores [K, G * block_q, block_kv] of a pair of blocks, `MASK_VALUE` where masked out.

        ``block_row`` counts over the whole batch, ``column`` within the batch row.
        """
        plan = self.plan
        batch_row = block_row // plan.N
        q_index = block_row % plan.N * plan.block_q + jnp.arange(plan.block_q) + self.offsets[batch_row]
        kv_index = column * plan.block_kv + jnp.arange(plan.block_kv)
        ids = self.q_ids[block_row], self.kv_ids[batch_row * plan.M + column]
        visible = jnp.tile(_visible(self.spec, *ids, q_index, kv_index), (plan.G, 1))
        scores = jnp.einsum("kqd,ktd->kqt", q, k, preferred_element_type=jnp.float32)
        return jnp.where(visible, scores * self.spec.scale, MASK_VALUE)

    def for_each_column(self, block_row, step, carry):
        """Run ``carry = step(column, index of its keys, carry)`` over the block columns of a block row."""

        def body(index, carry):
            column = block_pairs.block_column(self.pairs.items[index])
            return step(column, block_row // self.plan.N * self.plan.M + column, carry)

        return lax.fori_loop(self.pairs.starts[block_row], self.pairs.starts[block_row + 1], body, carry)


def _blocked_forward(plan: _BlockedPlan, spec, q, k, v, q_segments, kv_segments, offsets):
    loop = _BlockLoop(spec, plan, q_segments, kv_segments, offsets)
    operands = q, k, v, q_segments, kv_segments, offsets
    k, v, dtype = plan.keys(k), plan.keys(v), q.dtype

    def one_block_row(inputs):
        block_row, q = inputs

        def step(column, at, carry):
            running_max, running_sum, acc = carry
            scores = loop.scores(block_row, column, q, k[at])
            new_max = jnp.maximum(running_max, scores.max(-1))
            weights, rescale = jnp.exp(scores - new_max[..., None]), jnp.exp(running_max - new_max)
            product = jnp.einsum("kqt,ktd->kqd", weights.astype(v.dtype), v[at], preferred_element_type=jnp.float32)
            return new_max, running_sum * rescale + weights.sum(-1), acc * rescale[..., None] + product

        zeros = jnp.zeros(q.shape[:-1], jnp.float32)
        start = shapes.initial_carry((zeros + NEG_INF, zeros, jnp.zeros(q.shape, jnp.float32)), operands)
        running_max, running_sum, acc = loop.for_each_column(block_row, step, start)
        attends = running_sum > 0
        divisor = jnp.where(attends, running_sum, 1.0)
        return (acc / divisor[..., None]).astype(dtype), jnp.where(attends, running_max + jnp.log(divisor), -jnp.inf)

    out, logsumexp = lax.map(one_block_row, (jnp.arange(plan.B * plan.N), plan.queries(q)))
    return plan.from_queries(out), plan.from_queries(logsumexp)


def _blocked_backward(
    plan: _BlockedPlan, spec, q, k, v, q_segments, kv_segments, offsets, out, logsumexp, d_out, d_logsumexp
):
    loop = _BlockLoop(spec, plan, q_segments, kv_segments, offsets)
    operands = q, k, v, q_segments, kv_segments, offsets, d_out, d_logsumexp
    logsumexp, delta = logsumexp_and_delta(out, logsumexp, d_out, d_logsumexp, 0.0)
    dtypes = q.dtype, k.dtype, v.dtype
    d_out = plan.queries(d_out.astype(v.dtype))
    q, k, v, logsumexp, delta = (
        plan.queries(q),
        plan.keys(k),
        plan.keys(v),
        plan.queries(logsumexp),
        plan.queries(delta),
    )

    def product(pattern, a, b):
        return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)

    def one_block_row(carry, inputs):
        block_row, q, d_out, logsumexp, delta = inputs

        def step(column, at, carry):
            d_q, d_k, d_v = carry
            weights = jnp.exp(loop.scores(block_row, column, q, k[at]) - logsumexp[..., None])
            d_scores = weights * (product("kqd,ktd->kqt", d_out, v[at]) - delta[..., None]) * spec.scale
            d_scores = d_scores.astype(q.dtype)
            return (
                d_q + product("kqt,ktd->kqd", d_scores, k[at]),
                d_k.at[at].add(product("kqt,kqd->ktd", d_scores, q)),
                d_v.at[at].add(product("kqt,kqd->ktd", weights.astype(v.dtype), d_out)),
            )

        start = shapes.initial_carry(jnp.zeros(q.shape, jnp.float32), operands)
        d_q, d_k, d_v = loop.for_each_column(block_row, step, (start, *carry))
        return (d_k, d_v), d_q.astype(dtypes[0])

    zeros = shapes.initial_carry((jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)), operands)
    inputs = (jnp.arange(plan.B * plan.N), q, d_out, logsumexp, delta)
    (d_k, d_v), d_q = lax.scan(one_block_row, zeros, inputs)
    return plan.from_queries(d_q), plan.from_keys(d_k).astype(dtypes[1]), plan.from_keys(d_v).astype(dtypes[2])

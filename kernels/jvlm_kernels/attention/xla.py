"""Attention in plain XLA operations, on every device.

Three strategies, chosen in `_strategy` and nowhere else. Two cut a row into tiles of fixed places:

- dense: all S x T scores at once, for short rows and for decoding;
- local: with a promised segment length M, blocks of M queries see the neighbouring blocks only, so cost and memory
  follow S * M; this is what the windows of a ViT use.

The third, blocked, is for everything longer: a loop over the blocks of scores that segments touch and no others
(`jvlm_kernels.attention.blocks`), so memory follows S and cost what is in the row. On CPU it beats the dense form from
rows of 256 on, because its blocks stay in the cache.

No backward pass keeps scores; all recompute them (FlashAttention, arXiv 2205.14135): on CPU that is faster than
reading them back from memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jvlm_kernels import shapes
from jvlm_kernels.attention import blocks
from jvlm_kernels.attention.plan import Plan, normalisers, pad_to, padded_ids
from jvlm_kernels.attention.tuning import Blocks

PLATFORM = None
# Largest S * T computed at once.
_DENSE_SCORES = 256 * 256
# Queries and keys of a block of the blocked strategy, in rows up to a length and in longer ones.
_SHORT, _SHORT_BLOCK, _LONG_BLOCK = 768, 128, 256
_HIDDEN, _LOWEST = -1e30, -1e20


def check(spec, q, k, v) -> None:
    """Runs everywhere."""


def forward(spec, q, k, v, q_segments, kv_segments, offsets):
    """(out [B, S, H, D], logsumexp [B, S, H])."""
    strategy = _strategy(spec, q.shape[1], k.shape[1])
    if strategy is None:
        return _blocked_forward(spec, q, k, v, q_segments, kv_segments, offsets)
    tiling = strategy(spec, q_segments, kv_segments, offsets)
    tiles = zip(tiling.queries(q), tiling.keys(k), tiling.keys(v), tiling.places, strict=True)
    outs, sums = zip(*(_tile_forward(spec, *tile) for tile in tiles), strict=True)
    return tiling.join(outs), tiling.join(sums)


def backward(spec, q, k, v, q_segments, kv_segments, offsets, out, logsumexp, d_out, d_logsumexp):
    """(dq, dk, dv) from what the forward pass left."""
    strategy = _strategy(spec, q.shape[1], k.shape[1])
    if strategy is None:
        return _blocked_backward(spec, q, k, v, q_segments, kv_segments, offsets, out, logsumexp, d_out, d_logsumexp)
    tiling = strategy(spec, q_segments, kv_segments, offsets)
    (q_tiles, k_tiles, v_tiles), pull = jax.vjp(
        lambda q, k, v: (tiling.queries(q), tiling.keys(k), tiling.keys(v)), q, k, v
    )
    left = (tiling.queries(x) for x in (out, logsumexp, d_out, d_logsumexp))
    tiles = zip(q_tiles, k_tiles, v_tiles, tiling.places, *left, strict=True)
    d_q, d_k, d_v = zip(*(_tile_backward(spec, *tile) for tile in tiles), strict=True)
    return pull((list(d_q), list(d_k), list(d_v)))


def _strategy(spec, S: int, T: int) -> Callable | None:
    """How to cut a call into tiles; None for the blocked loop, as whoever asks for block sizes wants it."""
    M = spec.max_segment_length
    if spec.blocks is not None:
        return None
    if M is not None and (2 if spec.causal else 3) * M < T:
        return _local
    return _dense if S == 1 or S * T <= _DENSE_SCORES else None


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How operands are cut into tiles, by linear functions, and outputs joined.

    Attributes:
      places: of each tile the ids of queries and keys and their places in the row.
    """

    queries: Callable
    keys: Callable
    places: list[tuple]
    join: Callable


def _dense(spec, q_segments, kv_segments, offsets) -> _Tiling:
    q_index, kv_index = jnp.arange(q_segments.shape[1]), jnp.arange(kv_segments.shape[1])
    if spec.shifted:
        q_index = q_index + offsets[:, None]
    places = [(q_segments, kv_segments, q_index, kv_index)]
    return _Tiling(lambda x: [x], lambda x: [x], places, lambda tiles: tiles[0])


def _local(spec, q_segments, kv_segments, offsets) -> _Tiling:
    S, M = q_segments.shape[1], spec.max_segment_length
    count = -(-S // M)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * M - S)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], count, M, *x.shape[2:])

    def neighbours(x):
        x = split(x)
        edge = jnp.zeros_like(x[:, :1])
        parts = [jnp.concatenate([edge, x[:, :-1]], 1), x]
        if not spec.causal:
            parts.append(jnp.concatenate([x[:, 1:], edge], 1))
        return jnp.concatenate(parts, 2)

    index = jnp.arange(count * M).reshape(count, M)
    around = jnp.arange(-M, M if spec.causal else 2 * M)
    return _Tiling(
        lambda x: [split(x)],
        lambda x: [neighbours(x)],
        [(split(q_segments), neighbours(kv_segments), index, index[:, :1] + around)],
        lambda tiles: tiles[0].reshape(tiles[0].shape[0], count * M, *tiles[0].shape[3:])[:, :S],
    )


def _tile_forward(spec, q, k, v, places):
    """One dense tile, with leading axes of any number."""
    scores = _scores(spec, q, k, *places)
    top = scores.max(-1, keepdims=True)
    sees = top > 0.1 * _HIDDEN
    weights = jnp.exp(scores - top)
    total = weights.sum(-1)
    out = jnp.einsum("...kgst,...tkd->...skgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out * _queries_first(jnp.where(sees[..., 0], 1.0 / total, 0.0))[..., None]
    logsumexp = _queries_first(jnp.where(sees[..., 0], jnp.log(total) + top[..., 0], -jnp.inf))
    return out.astype(q.dtype).reshape(q.shape), logsumexp.reshape(q.shape[:-1])


def _tile_backward(spec, q, k, v, places, out, logsumexp, d_out, d_logsumexp):
    scores = _scores(spec, q, k, *places)
    logsumexp, delta = normalisers(out, logsumexp, d_out, d_logsumexp, 0.0)
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
    """Scaled scores [..., K, G, S, T] in float32; those that must not be seen hold a large negative number."""
    scores = jnp.einsum("...skgd,...tkd->...kgst", _grouped(q, k, -2), k, preferred_element_type=jnp.float32)
    visible = _visible(spec, q_segments, kv_segments, q_index, kv_index)
    return jnp.where(visible[..., None, None, :, :], scores * spec.scale, _HIDDEN)


def _visible(spec, q_segments, kv_segments, q_index, kv_index):
    """Mask [..., S, T]."""
    visible = (q_segments[..., :, None] == kv_segments[..., None, :]) & (q_segments[..., :, None] > 0)
    distance = q_index[..., :, None] - kv_index[..., None, :]
    if spec.causal:
        visible &= distance >= 0
    if spec.window is not None:
        visible &= jnp.abs(distance) < spec.window
    return visible


def _grouped(x, k, axis: int = -1):
    """The axis of query heads split into [K, G]."""
    K, axis = k.shape[-2], axis % x.ndim
    return x.reshape(*x.shape[:axis], K, x.shape[axis] // K, *x.shape[axis + 1 :])


def _queries_first(x):
    """[..., K, G, S] to [..., S, K, G]."""
    return jnp.moveaxis(x, -1, -3)


def _queries_last(x):
    """[..., S, K, G] to [..., K, G, S]."""
    return jnp.moveaxis(x, -3, -1)


class _Blocked(Plan):
    """A call whose blocks are a matrix each head: queries [B * N, K, G * block_q, D], keys [B * M, K, block_kv, D]."""

    def queries(self, x):
        """[B, S, H, ...] to [B * N, K, G * block_q, ...]."""
        x = pad_to(x, 1, self.N * self.block_q)
        x = x.reshape(self.B * self.N, self.block_q, self.K, self.G, *x.shape[3:])
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(self.B * self.N, self.K, self.G * self.block_q, *x.shape[4:])

    def from_queries(self, x):
        """The inverse of `queries`."""
        x = jnp.moveaxis(x.reshape(self.B * self.N, self.K, self.G, self.block_q, *x.shape[3:]), 3, 1)
        return x.reshape(self.B, self.N * self.block_q, self.H, *x.shape[4:])[:, : self.S]

    def keys(self, x):
        """[B, T, K, D] to [B * M, K, block_kv, D]."""
        x = pad_to(x, 1, self.M * self.block_kv)
        return jnp.moveaxis(x.reshape(self.B * self.M, self.block_kv, self.K, self.D), 1, 2)

    def from_keys(self, x):
        """The inverse of `keys`."""
        return jnp.moveaxis(x, 2, 1).reshape(self.B, self.M * self.block_kv, self.K, self.D)[:, : self.T]


def _blocked(spec, q, k) -> _Blocked:
    block = _SHORT_BLOCK if max(q.shape[1], k.shape[1]) <= _SHORT else _LONG_BLOCK
    return _Blocked.of(spec, q, k, spec.blocks or Blocks(block, block))


class _Walk:
    """The blocks of a call that are visited, and their scores."""

    def __init__(self, spec, cut: _Blocked, q_segments, kv_segments, offsets):
        self.spec, self.cut, self.offsets = spec, cut, offsets
        q_ids, kv_ids = padded_ids(q_segments, kv_segments, cut.N * cut.block_q, cut.M * cut.block_kv)
        self.q_ids, self.kv_ids = q_ids.reshape(-1, cut.block_q), kv_ids.reshape(-1, cut.block_kv)
        found = cut.visited(spec, q_segments, kv_segments, offsets)
        self.visits = blocks.list_visits(*found, cut.visits, fill=False)

    def scores(self, line, partner, q, k):
        """Scaled scores [K, G * block_q, block_kv] of a query block and a key block, hidden ones low."""
        cut = self.cut
        row = line // cut.N
        q_index = line % cut.N * cut.block_q + jnp.arange(cut.block_q) + self.offsets[row]
        kv_index = partner * cut.block_kv + jnp.arange(cut.block_kv)
        ids = self.q_ids[line], self.kv_ids[row * cut.M + partner]
        visible = jnp.tile(_visible(self.spec, *ids, q_index, kv_index), (cut.G, 1))
        scores = jnp.einsum("kqd,ktd->kqt", q, k, preferred_element_type=jnp.float32)
        return jnp.where(visible, scores * self.spec.scale, _HIDDEN)

    def for_each_partner(self, line, step, carry):
        """``carry = step(partner, index of its keys, carry)`` over the key blocks that a query block visits."""

        def body(visit, carry):
            partner = blocks.partner_of(self.visits.items[visit])
            return step(partner, line // self.cut.N * self.cut.M + partner, carry)

        return lax.fori_loop(self.visits.starts[line], self.visits.starts[line + 1], body, carry)


def _blocked_forward(spec, q, k, v, q_segments, kv_segments, offsets):
    cut = _blocked(spec, q, k)
    walk = _Walk(spec, cut, q_segments, kv_segments, offsets)
    operands = q, k, v, q_segments, kv_segments, offsets
    k, v, dtype = cut.keys(k), cut.keys(v), q.dtype

    def one_line(inputs):
        line, q = inputs

        def step(partner, at, carry):
            top, total, sums = carry
            scores = walk.scores(line, partner, q, k[at])
            now = jnp.maximum(top, scores.max(-1))
            weights, shrink = jnp.exp(scores - now[..., None]), jnp.exp(top - now)
            more = jnp.einsum("kqt,ktd->kqd", weights.astype(v.dtype), v[at], preferred_element_type=jnp.float32)
            return now, total * shrink + weights.sum(-1), sums * shrink[..., None] + more

        zeros = jnp.zeros(q.shape[:-1], jnp.float32)
        start = shapes.varying((zeros + _LOWEST, zeros, jnp.zeros(q.shape, jnp.float32)), operands)
        top, total, sums = walk.for_each_partner(line, step, start)
        seen = total > 0
        divisor = jnp.where(seen, total, 1.0)
        return (sums / divisor[..., None]).astype(dtype), jnp.where(seen, top + jnp.log(divisor), -jnp.inf)

    out, logsumexp = lax.map(one_line, (jnp.arange(cut.B * cut.N), cut.queries(q)))
    return cut.from_queries(out), cut.from_queries(logsumexp)


def _blocked_backward(spec, q, k, v, q_segments, kv_segments, offsets, out, logsumexp, d_out, d_logsumexp):
    cut = _blocked(spec, q, k)
    walk = _Walk(spec, cut, q_segments, kv_segments, offsets)
    operands = q, k, v, q_segments, kv_segments, offsets, d_out, d_logsumexp
    logsumexp, delta = normalisers(out, logsumexp, d_out, d_logsumexp, 0.0)
    dtypes = q.dtype, k.dtype, v.dtype
    d_out = cut.queries(d_out.astype(v.dtype))
    q, k, v, logsumexp, delta = cut.queries(q), cut.keys(k), cut.keys(v), cut.queries(logsumexp), cut.queries(delta)

    def product(pattern, a, b):
        return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)

    def one_line(carry, inputs):
        line, q, d_out, logsumexp, delta = inputs

        def step(partner, at, carry):
            d_q, d_k, d_v = carry
            weights = jnp.exp(walk.scores(line, partner, q, k[at]) - logsumexp[..., None])
            d_scores = weights * (product("kqd,ktd->kqt", d_out, v[at]) - delta[..., None]) * spec.scale
            d_scores = d_scores.astype(q.dtype)
            return (
                d_q + product("kqt,ktd->kqd", d_scores, k[at]),
                d_k.at[at].add(product("kqt,kqd->ktd", d_scores, q)),
                d_v.at[at].add(product("kqt,kqd->ktd", weights.astype(v.dtype), d_out)),
            )

        start = shapes.varying(jnp.zeros(q.shape, jnp.float32), operands)
        d_q, d_k, d_v = walk.for_each_partner(line, step, (start, *carry))
        return (d_k, d_v), d_q.astype(dtypes[0])

    none = shapes.varying((jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)), operands)
    lines = (jnp.arange(cut.B * cut.N), q, d_out, logsumexp, delta)
    (d_k, d_v), d_q = lax.scan(one_line, none, lines)
    return cut.from_queries(d_q), cut.from_keys(d_k).astype(dtypes[1]), cut.from_keys(d_v).astype(dtypes[2])

"""Which blocks of scores a call must compute. Worked out on the device from segment ids, one number a block.

Shapes: B rows; N query blocks of ``block_q``; M key blocks of ``block_kv``. Nothing here is larger than [B, N, M].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# An item: flags, kind, partner, line, from the lowest bit on.
_FIRST, _LAST = 1, 2
_KIND, _KIND_BITS = 2, 2
_PARTNER, _PARTNER_BITS = 4, 13
_LINE = _PARTNER + _PARTNER_BITS
_NOTHING, _MASKED, _FULL = range(3)
MOST_LINES, MOST_PARTNERS = 1 << (31 - _LINE), 1 << _PARTNER_BITS


class Visits(NamedTuple):
    """Blocks to compute, in order of a line (a block of queries, or of keys) and its partners in that line.

    Attributes:
      items: one int32 a visit: whether the line begins or ends with it, whether it needs a mask, the partner's number,
        and the line's number counted over all rows of the batch.
      starts: where the visits of each line begin; one longer than the number of lines.
    """

    items: Int[Array, " V"]
    starts: Int[Array, " L+1"]

    @property
    def count(self) -> Int[Array, ""]:
        """How many of the items are meant; the rest is filling."""
        return self.starts[-1]


def visited(
    spec,
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    offsets: Int[Array, " B"],
    block_q: int,
    block_kv: int,
) -> tuple[Bool[Array, "B N M"], Bool[Array, "B N M"]]:
    """(blocks that may hold a visible pair, blocks in which every pair is visible).

    A block is visited when the ranges of ids of its queries and keys overlap, and causality and window allow it. For
    ids in ascending order that is exactly the interval of keys that the block's segments touch; for any other order
    it holds all of them and more, so the result stays right.
    """
    q, kv = _ranges(q_segments, block_q), _ranges(kv_segments, block_kv)
    q_low, q_high, q_whole = (x[:, :, None] for x in q)
    kv_low, kv_high, kv_whole = (x[:, None, :] for x in kv)
    some = (q_low <= kv_high) & (kv_low <= q_high)
    every = q_whole & kv_whole & (q_low == kv_low)
    q_first = (jnp.arange(some.shape[1]) * block_q)[None, :, None] + offsets[:, None, None]
    kv_first = (jnp.arange(some.shape[2]) * block_kv)[None, None, :]
    q_last, kv_last = q_first + block_q - 1, kv_first + block_kv - 1
    if spec.causal:
        some &= kv_first <= q_last
        every &= kv_last <= q_first
    for reach in (spec.window, spec.max_segment_length):
        if reach is not None:
            some &= (q_first - kv_last < reach) & (kv_first - q_last < reach)
    if spec.window is not None:
        every &= (q_last - kv_first < spec.window) & (kv_last - q_first < spec.window)
    return some, every & some


def _ranges(segments: Int[Array, "B S"], block: int):
    """(lowest id, highest id, all of one segment) of each block, padding aside; lowest > highest if all is padding."""
    B, S = segments.shape
    ids = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, -S % block))).reshape(B, -1, block)
    low = jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max).min(-1)
    high = jnp.maximum(ids.max(-1), 0)
    return low, high, (low == high) & (ids > 0).all(-1)


def most_visits(spec, S: int, T: int, block_q: int, block_kv: int) -> int:
    """How many blocks of one row can be visited at most, whatever its segments, lines without any filled."""
    N, M = -(-S // block_q), -(-T // block_kv)
    reach = min(T, *(r for r in (spec.window, spec.max_segment_length) if r is not None), T)
    a_line = min(M, (block_q + (1 if spec.causal else 2) * (reach - 1) - 1) // block_kv + 2)
    if spec.causal and not spec.shifted:
        seen = (min(a_line, M, (i + 1) * block_q // block_kv + 1) for i in range(N))
        return sum(seen) + M
    return N * a_line + M + N


def list_visits(some: Bool[Array, "B N M"], every: Bool[Array, "B N M"], size: int, *, fill: bool) -> Visits:
    """The visits in order of (row, N), M.

    Args:
      size: places of the list; see `most_visits`.
      fill: give a line without visits one (in which nothing is visible), so that its output gets written.
    """
    B, N, M = some.shape
    kinds = jnp.where(every, _FULL, _MASKED)
    if fill:
        empty = ~some.any(-1)
        kinds = kinds.at[..., 0].set(jnp.where(empty, _NOTHING, kinds[..., 0]))
        some = some.at[..., 0].set(some[..., 0] | empty)
    lines, kinds = some.reshape(B * N, M), kinds.reshape(B * N, M)
    count = lines.sum(-1, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count, dtype=jnp.int32)])
    rank = jnp.cumsum(lines, -1, dtype=jnp.int32)
    flags = jnp.where(rank == 1, _FIRST, 0) | jnp.where(rank == count[:, None], _LAST, 0)
    partner, line = jnp.arange(M, dtype=jnp.int32)[None], jnp.arange(B * N, dtype=jnp.int32)[:, None]
    items = flags | kinds << _KIND | partner << _PARTNER | line << _LINE
    place = jnp.where(lines, starts[:-1, None] + rank - 1, size)
    return Visits(jnp.zeros(size, jnp.int32).at[place].set(items.astype(jnp.int32), mode="drop"), starts)


def line_of(item):
    """Number of the visit's line, counted over all rows of the batch."""
    return item >> _LINE


def partner_of(item):
    """Number of the block that the line meets."""
    return (item >> _PARTNER) & (MOST_PARTNERS - 1)


def is_first(item):
    """Whether the line begins with this visit."""
    return (item & _FIRST) != 0


def is_last(item):
    """Whether the line ends with this visit."""
    return (item & _LAST) != 0


def is_full(item):
    """Whether all pairs of the block are visible, so that no mask is needed."""
    return _kind_of(item) == _FULL


def is_masked(item):
    """Whether only some pairs are. Neither this nor full: the visit is filling, and there is nothing to compute."""
    return _kind_of(item) == _MASKED


def _kind_of(item):
    return (item >> _KIND) & ((1 << _KIND_BITS) - 1)


def fits(rows: int, lines: int, partners: int) -> bool:
    """Whether lists of this size can be written, seen from either side."""
    return rows * max(lines, partners) <= MOST_LINES and max(lines, partners) <= MOST_PARTNERS


def transposed(blocks: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The same blocks seen from the keys: [B, M, N]."""
    some, every = blocks
    return some.swapaxes(1, 2), every.swapaxes(1, 2)

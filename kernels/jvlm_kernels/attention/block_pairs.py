"""The pairs of blocks (queries x keys) that a call must compute, found on the device from segment ids.

A kernel computes one *block row* at a time: a block of queries, or, for the gradients of keys and values, a block of
keys. Each block of the other side that it must meet is a *block column*. `block_mask` says which pairs are needed (as
FlexAttention's block mask does), `list_pairs` lists them as *work items*, one int32 each.

Shapes: B batch rows; N query blocks of ``block_q``; M key blocks of ``block_kv``. No array is larger than [B, N, M].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Bits of a work item, from the lowest: first and last of its block row, kind, block column, block row.
_FIRST, _LAST = 1, 2
_KIND, _KIND_BITS = 2, 2
_COLUMN, _COLUMN_BITS = 4, 13
_ROW = _COLUMN + _COLUMN_BITS
_EMPTY, _PARTIAL, _FULL = range(3)
MAX_BLOCK_ROWS, MAX_BLOCK_COLUMNS = 1 << (31 - _ROW), 1 << _COLUMN_BITS


class BlockPairs(NamedTuple):
    """The pairs of blocks to compute, in order of block row, then block column.

    Attributes:
      items: one work item for each pair: whether it is the first or last of its block row, whether it needs a mask,
        the number of its block column, and the number of its block row counted over the whole batch.
      starts: index of the first item of each block row; one longer than the number of block rows.
    """

    items: Int[Array, " V"]
    starts: Int[Array, " R+1"]

    @property
    def count(self) -> Int[Array, ""]:
        """Number of valid items; those behind them are padding."""
        return self.starts[-1]


def block_mask(
    spec,
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    offsets: Int[Array, " B"],
    block_q: int,
    block_kv: int,
) -> tuple[Bool[Array, "B N M"], Bool[Array, "B N M"]]:
    """Return (needed, full): pairs of blocks that may hold a visible score, and those in which every score is visible.

    A pair is needed when the ranges of segment ids of its queries and keys overlap and the causal mask and window allow
    it. For ascending ids these are exactly the blocks that the segments touch; for ids in any other order they are
    a superset, so the result stays right.
    """
    q, kv = _id_ranges(q_segments, block_q), _id_ranges(kv_segments, block_kv)
    q_low, q_high, q_whole = (x[:, :, None] for x in q)
    kv_low, kv_high, kv_whole = (x[:, None, :] for x in kv)
    needed = (q_low <= kv_high) & (kv_low <= q_high)
    full = q_whole & kv_whole & (q_low == kv_low)
    q_first = (jnp.arange(needed.shape[1]) * block_q)[None, :, None] + offsets[:, None, None]
    kv_first = (jnp.arange(needed.shape[2]) * block_kv)[None, None, :]
    q_last, kv_last = q_first + block_q - 1, kv_first + block_kv - 1
    if spec.causal:
        needed &= kv_first <= q_last
        full &= kv_last <= q_first
    for limit in (spec.window, spec.max_segment_length):
        if limit is not None:
            needed &= (q_first - kv_last < limit) & (kv_first - q_last < limit)
    if spec.window is not None:
        full &= (q_last - kv_first < spec.window) & (kv_last - q_first < spec.window)
    return needed, full & needed


def _id_ranges(segments: Int[Array, "B S"], block: int):
    """Return (lowest id, highest id, whether all ids are equal) of each block, ignoring padding.

    A block of padding alone has a lowest id above its highest.
    """
    B, S = segments.shape
    ids = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, -S % block))).reshape(B, -1, block)
    low = jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max).min(-1)
    high = jnp.maximum(ids.max(-1), 0)
    return low, high, (low == high) & (ids > 0).all(-1)


def max_pairs(spec, S: int, T: int, block_q: int, block_kv: int) -> int:
    """Return an upper bound on the work items of one batch row, whatever its segments; empty block rows included."""
    N, M = -(-S // block_q), -(-T // block_kv)
    limit = min(T, *(r for r in (spec.window, spec.max_segment_length) if r is not None), T)
    per_row = min(M, (block_q + (1 if spec.causal else 2) * (limit - 1) - 1) // block_kv + 2)
    if spec.causal and not spec.has_offset:
        counts = (min(per_row, M, (i + 1) * block_q // block_kv + 1) for i in range(N))
        return sum(counts) + M
    return N * per_row + M + N


def list_pairs(
    needed: Bool[Array, "B N M"], full: Bool[Array, "B N M"], size: int, *, cover_empty_rows: bool
) -> BlockPairs:
    """Return the needed pairs in order of (batch row, N), M.

    Args:
      needed, full: see `block_mask`.
      size: length of the list; see `max_pairs`.
      cover_empty_rows: give a block row without any pair one empty item, so that a kernel writes its output.
    """
    B, N, M = needed.shape
    kinds = jnp.where(full, _FULL, _PARTIAL)
    if cover_empty_rows:
        empty = ~needed.any(-1)
        kinds = kinds.at[..., 0].set(jnp.where(empty, _EMPTY, kinds[..., 0]))
        needed = needed.at[..., 0].set(needed[..., 0] | empty)
    listed, kinds = needed.reshape(B * N, M), kinds.reshape(B * N, M)
    count = listed.sum(-1, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count, dtype=jnp.int32)])
    rank = jnp.cumsum(listed, -1, dtype=jnp.int32)
    flags = jnp.where(rank == 1, _FIRST, 0) | jnp.where(rank == count[:, None], _LAST, 0)
    column, row = jnp.arange(M, dtype=jnp.int32)[None], jnp.arange(B * N, dtype=jnp.int32)[:, None]
    items = flags | kinds << _KIND | column << _COLUMN | row << _ROW
    index = jnp.where(listed, starts[:-1, None] + rank - 1, size)
    return BlockPairs(jnp.zeros(size, jnp.int32).at[index].set(items.astype(jnp.int32), mode="drop"), starts)


def block_row(item):
    """Return the number of the item's block row, counted over the whole batch."""
    return item >> _ROW


def block_column(item):
    """Return the number of the item's block column, within its batch row."""
    return (item >> _COLUMN) & (MAX_BLOCK_COLUMNS - 1)


def is_first(item):
    """Return whether the item is the first of its block row."""
    return (item & _FIRST) != 0


def is_last(item):
    """Return whether the item is the last of its block row."""
    return (item & _LAST) != 0


def is_full(item):
    """Return whether every score of the pair is visible, so that it needs no mask."""
    return _kind_of(item) == _FULL


def is_partial(item):
    """Return whether only some scores of the pair are visible; an item neither partial nor full is empty."""
    return _kind_of(item) == _PARTIAL


def _kind_of(item):
    return (item >> _KIND) & ((1 << _KIND_BITS) - 1)


def fits(batch_rows: int, query_blocks: int, key_blocks: int) -> bool:
    """Return whether work items have enough bits for calls of this size, by block rows of queries and of keys."""
    most = max(query_blocks, key_blocks)
    return batch_rows * most <= MAX_BLOCK_ROWS and most <= MAX_BLOCK_COLUMNS


def transpose(mask: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return a block mask (needed, full) with keys as block rows: [B, M, N]."""
    needed, full = mask
    return needed.swapaxes(1, 2), full.swapaxes(1, 2)

"""How a call is divided into blocks: the sizes and counts that every blocked implementation needs.

Shapes: B batch rows, S queries, T keys, H query heads, K key heads with G queries each, D head size, N query blocks,
M key blocks.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax.numpy as jnp

from jvlm_kernels.attention import block_pairs
from jvlm_kernels.attention.tuning import BlockSizes
from jvlm_kernels.errors import Unavailable

P = TypeVar("P", bound="BlockPlan")


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Sizes of a call; shape letters as in the module's docstring.

    Attributes:
      itemsize: bytes of an element.
      sizes: block sizes of the kernel.
      max_pairs: length of the list of work items, for all batch rows.
    """

    B: int
    S: int
    T: int
    H: int
    K: int
    D: int
    itemsize: int
    sizes: BlockSizes
    max_pairs: int

    @classmethod
    def of(cls: type[P], spec, q, k, sizes: BlockSizes) -> P:
        """Return the plan of a call.

        Raises:
          Unavailable: more blocks than work items can number.
        """
        (B, S, H, D), (_, T, K, _) = q.shape, k.shape
        max_pairs = B * block_pairs.max_pairs(spec, S, T, sizes.q, sizes.kv)
        plan = cls(B, S, T, H, K, D, q.dtype.itemsize, sizes, max_pairs)
        if not block_pairs.fits(B, plan.N, plan.M):
            raise Unavailable(f"{B} batch rows of {plan.N} x {plan.M} blocks are more than work items can number")
        return plan

    @property
    def block_q(self) -> int:
        return self.sizes.q

    @property
    def block_kv(self) -> int:
        return self.sizes.kv

    @property
    def heads(self) -> int:
        return self.sizes.heads

    @property
    def N(self) -> int:
        return -(-self.S // self.block_q)

    @property
    def M(self) -> int:
        return -(-self.T // self.block_kv)

    @property
    def G(self) -> int:
        return self.H // self.K

    def block_mask(self, spec, q_segments, kv_segments, offsets):
        """Return `block_pairs.block_mask` at this plan's block sizes."""
        return block_pairs.block_mask(spec, q_segments, kv_segments, offsets, self.block_q, self.block_kv)


class PaddedBlockPlan(BlockPlan):
    """A plan whose operands are padded to whole blocks and to the kernel's head size."""

    @property
    def head(self) -> int:
        """Head size after padding."""
        raise NotImplementedError

    def queries(self, x):
        """Return ``x`` [B, S, ...] padded to whole blocks of queries, and the head axis, if there is one, to `head`."""
        return self._padded(x, self.N * self.block_q)

    def keys(self, x):
        """Return ``x`` [B, T, ...] padded to whole blocks of keys, and the head axis, if there is one, to `head`."""
        return self._padded(x, self.M * self.block_kv)

    def _padded(self, x, length: int):
        x = pad_to(x, 1, length)
        return pad_to(x, 3, self.head) if x.ndim == 4 else x


def check_dtypes(q, k, v, *accepted) -> None:
    """Raise `Unavailable` unless all have the same dtype, one of ``accepted``."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in accepted:
        names = ", ".join(jnp.dtype(dtype).name for dtype in accepted)
        raise Unavailable(f"takes {names}, the same for all; got {q.dtype}, {k.dtype}, {v.dtype}")


def pad_to(x, axis: int, size: int):
    """Return ``x`` with zeros appended along an axis, up to ``size``."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def padded_segment_ids(q_segments, kv_segments, queries: int, keys: int):
    """Return the ids padded to these lengths; padding is 0 for queries and -1 for keys, so that they never match."""
    q_ids = pad_to(jnp.maximum(q_segments, 0), 1, queries)
    kv_ids = pad_to(jnp.maximum(kv_segments, 0), 1, keys)
    return q_ids, jnp.where(kv_ids > 0, kv_ids, -1)


def logsumexp_and_delta(out, logsumexp, d_out, d_logsumexp, empty: float):
    """Return (logsumexp, delta) [..., S, H] for a backward pass; delta is FlashAttention-2's D, the rowsum of dO * O.

    Args:
      empty: replaces the logsumexp, -inf, of queries that attend to no key; it must make all their weights 0.
    """
    attends = jnp.isfinite(logsumexp)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - jnp.where(attends, d_logsumexp, 0.0)
    return jnp.where(attends, logsumexp, empty), delta

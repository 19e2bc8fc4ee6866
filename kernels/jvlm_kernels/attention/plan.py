"""How a call is cut into blocks, whatever the kernel.

Shapes: B rows, S queries, T keys, H query heads, K key heads with G queries each, D head size, N query blocks, M key
blocks.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax.numpy as jnp

from jvlm_kernels.attention import blocks
from jvlm_kernels.attention.tuning import Blocks
from jvlm_kernels.errors import Unavailable

P = TypeVar("P", bound="Plan")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a call.

    Attributes:
      itemsize: bytes of an element.
      sizes: how the kernel cuts its work.
      visits: places of the list of blocks to visit, for all rows.
    """

    B: int
    S: int
    T: int
    H: int
    K: int
    D: int
    itemsize: int
    sizes: Blocks
    visits: int

    @classmethod
    def of(cls: type[P], spec, q, k, sizes: Blocks) -> P:
        """Raises `Unavailable` for more blocks than a list of visits can number."""
        (B, S, H, D), (_, T, K, _) = q.shape, k.shape
        visits = B * blocks.most_visits(spec, S, T, sizes.q, sizes.kv)
        plan = cls(B, S, T, H, K, D, q.dtype.itemsize, sizes, visits)
        if not blocks.fits(B, plan.N, plan.M):
            raise Unavailable(f"{B} rows of {plan.N} x {plan.M} blocks are too many to number")
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

    def visited(self, spec, q_segments, kv_segments, offsets):
        """`blocks.visited` at this plan's sizes."""
        return blocks.visited(spec, q_segments, kv_segments, offsets, self.block_q, self.block_kv)


class PaddedPlan(Plan):
    """A plan whose operands are padded to whole blocks of rows and whole heads."""

    @property
    def head(self) -> int:
        """The head size that a block has."""
        raise NotImplementedError

    def queries(self, x):
        """Padded to whole blocks, and the last axis of four to whole heads."""
        return self._padded(x, self.N * self.block_q)

    def keys(self, x):
        """As `queries`, for keys and values."""
        return self._padded(x, self.M * self.block_kv)

    def _padded(self, x, length: int):
        x = pad_to(x, 1, length)
        return pad_to(x, 3, self.head) if x.ndim == 4 else x


def check_dtypes(q, k, v, *accepted) -> None:
    """Raises `Unavailable` unless all have one of the dtypes."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in accepted:
        names = ", ".join(jnp.dtype(dtype).name for dtype in accepted)
        raise Unavailable(f"takes {names}, the same for all; got {q.dtype}, {k.dtype}, {v.dtype}")


def pad_to(x, axis: int, size: int):
    """Zeros at the end of an axis, up to ``size``."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def padded_ids(q_segments, kv_segments, queries: int, keys: int):
    """Ids up to whole blocks, padding of queries 0 and of keys -1, so that they never meet."""
    q_ids = pad_to(jnp.maximum(q_segments, 0), 1, queries)
    kv_ids = pad_to(jnp.maximum(kv_segments, 0), 1, keys)
    return q_ids, jnp.where(kv_ids > 0, kv_ids, -1)


def normalisers(out, logsumexp, d_out, d_logsumexp, unseen: float):
    """(logsumexp, delta) [..., S, H] as a backward pass needs them.

    Queries that see nothing have a logsumexp of -inf; ``unseen`` in its place must make every weight 0.
    """
    seen = jnp.isfinite(logsumexp)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - jnp.where(seen, d_logsumexp, 0.0)
    return jnp.where(seen, logsumexp, unseen), delta

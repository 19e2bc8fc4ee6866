"""Attention of one device's part of a row to the whole of it. Runs inside `jax.shard_map`.

Keys, values and their segment ids come from the devices that have them: from the neighbours alone where a promise
bounds how far a query sees (windows and frames of a vision tower, short conversations), else from all. The kernels then
visit the blocks that segments touch and no others.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int
from jvlm_kernels import segment_attention


def attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    *,
    axes: tuple[str, ...],
    same_row: bool,
    causal: bool = False,
    window: int | None = None,
    max_segment_length: int | None = None,
    **options: Any,
) -> Float[Array, "B S H D"]:
    """`jvlm_kernels.segment_attention` of a row that is split over mesh axes.

    Args:
      axes: mesh axes over which both sequences are split, in order; empty where each device has the whole.
      same_row: whether queries and keys are the same places.
    """
    if not axes:
        return segment_attention(
            q,
            k,
            v,
            q_segments,
            kv_segments,
            causal=causal,
            window=window,
            max_segment_length=max_segment_length if same_row else None,
            **options,
        )
    length = q.shape[1]
    reach = _reach(window, max_segment_length) if same_row else None
    if reach is not None and reach <= length:
        behind, ahead = reach, 0 if causal else reach
        k, v, kv_segments = (_with_neighbours(x, axes, behind, ahead) for x in (k, v, kv_segments))
        offset = behind
    else:
        k, v, kv_segments = (gathered(x, axes) for x in (k, v, kv_segments))
        offset = lax.axis_index(axes) * length
    placed = {"q_offset": offset} if causal or window is not None else {}
    return segment_attention(q, k, v, q_segments, kv_segments, causal=causal, window=window, **placed, **options)


def _reach(window: int | None, max_segment_length: int | None) -> int | None:
    """How many places away a key can be, in whole vector registers; None where it can be anywhere."""
    bounds = [bound - 1 for bound in (window, max_segment_length) if bound is not None]
    return -(-min(bounds) // 8) * 8 if bounds else None


def gathered(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The whole of a row, from the parts of it that devices hold.

    Parts arrive one after the other along the first dimension: XLA for TPU then scatters the sum of the gradient. Along
    any other dimension, which a layout could move, it may sum the whole on every device and cut.
    """
    B, T, *rest = x.shape
    parts = lax.all_gather(x, axes, tiled=True).reshape(-1, B, T, *rest)
    return jnp.moveaxis(parts, 0, 1).reshape(B, -1, *rest)


def _with_neighbours(x: jax.Array, axes: tuple[str, ...], behind: int, ahead: int) -> jax.Array:
    """The part of a row with so many places of the parts before and after it; zeros beyond the ends of the row."""
    count = lax.axis_size(axes)
    parts = [x]
    if behind:
        parts.insert(0, lax.ppermute(x[:, -behind:], axes, [(i, i + 1) for i in range(count - 1)]))
    if ahead:
        parts.append(lax.ppermute(x[:, :ahead], axes, [(i + 1, i) for i in range(count - 1)]))
    return jnp.concatenate(parts, axis=1)

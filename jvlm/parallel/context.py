"""Context parallelism: attention of one device's shard of the queries to all keys. Runs inside `jax.shard_map`.

Keys, values and their segment ids come from the devices that have them: from the neighbours alone where the distance
from a query to its keys is bounded (windows and images of a vision encoder, short conversations), else from all. The
kernels then compute the blocks that segments touch and no others.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped
from jvlm_kernels import segment_attention


def attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    *,
    axes: tuple[str, ...],
    is_self_attention: bool,
    causal: bool = False,
    window: int | None = None,
    max_segment_length: int | None = None,
    **options: Any,
) -> Float[Array, "B S H D"]:
    """`jvlm_kernels.segment_attention` of sequences that are split over mesh axes.

    Args:
      axes: mesh axes that split queries and keys, in order; empty where each device has all of them.
      is_self_attention: whether queries and keys are at the same positions.
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
            max_segment_length=max_segment_length if is_self_attention else None,
            **options,
        )
    length = q.shape[1]
    bound = reach(window, max_segment_length) if is_self_attention else None
    if bound is not None and bound <= length:
        behind, ahead = bound, 0 if causal else bound
        k, v, kv_segments = (_with_neighbours(x, axes, behind, ahead) for x in (k, v, kv_segments))
        offset = behind
    else:
        k, v, kv_segments = (all_gather_sequence(x, axes) for x in (k, v, kv_segments))
        offset = lax.axis_index(axes) * length
    offsets = {"q_offset": offset} if causal or window is not None else {}
    return segment_attention(q, k, v, q_segments, kv_segments, causal=causal, window=window, **offsets, **options)


def reach(window: int | None, max_segment_length: int | None) -> int | None:
    """Return how many positions away a key can be, in whole vector registers; None where there is no bound."""
    bounds = [bound - 1 for bound in (window, max_segment_length) if bound is not None]
    return -(-min(bounds) // 8) * 8 if bounds else None


def all_gather_sequence(x: Shaped[Array, "B T *L"], axes: tuple[str, ...]) -> Shaped[Array, "B S *L"]:
    """Return whole sequences from the shards that devices hold.

    Shards are gathered along the first dimension: XLA for TPU then reduce-scatters the gradient. Along any other
    dimension, which a layout could move, it may all-reduce the whole gradient and slice it.
    """
    B, T, *rest = x.shape
    shards = lax.all_gather(x, axes, tiled=True).reshape(-1, B, T, *rest)
    return jnp.moveaxis(shards, 0, 1).reshape(B, -1, *rest)


def _with_neighbours(x: jax.Array, axes: tuple[str, ...], behind: int, ahead: int) -> jax.Array:
    """Return a shard with so many positions of the shards before and after it; zeros beyond the sequence's ends."""
    count = lax.axis_size(axes)
    pieces = [x]
    if behind:
        pieces.insert(0, lax.ppermute(x[:, -behind:], axes, [(i, i + 1) for i in range(count - 1)]))
    if ahead:
        pieces.append(lax.ppermute(x[:, :ahead], axes, [(i + 1, i) for i in range(count - 1)]))
    return jnp.concatenate(pieces, axis=1)

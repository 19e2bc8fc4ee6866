"""Ring attention: keys and values travel over the devices that split a sequence, one shard at a time.

Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (arXiv 2310.01889). No
device ever holds the keys of more than two shards. A shard is sent on while it is attended to, so that the network and
the arithmetic overlap. It travels no further than segments reach: of packed short conversations, to the next device
alone.

Shapes: B batch rows, S positions of a shard, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int
from jvlm_kernels import RESIDUAL_NAMES, segment_attention, segment_attention_gradients

C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class Ring:
    """The static part of a call.

    Attributes:
      axes: mesh axes that split the sequence, in order.
      causal, window: as in `jvlm_kernels.segment_attention`.
      limit: shards that a query attends across at most, whatever the segments.
      options: further arguments of `jvlm_kernels.segment_attention`, sorted.
    """

    axes: tuple[str, ...]
    causal: bool
    window: int | None
    limit: int
    options: tuple[tuple[str, Any], ...] = ()

    def arguments(self, distance, length: int) -> dict[str, Any]:
        """Return the arguments of attention to the keys of the shard at a distance (positive is behind)."""
        offset = {"q_offset": distance * length} if self.causal or self.window is not None else {}
        return {"causal": self.causal, "window": self.window, **offset, **dict(self.options)}


class _Shard(NamedTuple):
    """What travels: keys and values, their segment ids, and in the backward pass their gradients so far."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array
    gradients: tuple[jax.Array, jax.Array] | None = None


def reach(segments: Int[Array, "B S"], axes: tuple[str, ...], rows: tuple[str, ...]) -> Int[Array, ""]:
    """Return across how many shards a segment of any row reaches: the same number on every device.

    It is exact where ids ascend along the sequence, and never too small. Runs inside `jax.shard_map`.

    Args:
      segments: this device's shard.
      axes: mesh axes that split the sequence.
      rows: mesh axes that split the batch.
    """
    low = jnp.where(segments > 0, segments, jnp.iinfo(segments.dtype).max).min(-1)
    high = jnp.maximum(segments.max(-1), 0)
    lows, highs = lax.all_gather(jnp.stack([low, high]), axes, axis=1)
    meets = ((lows <= high) & (low <= highs)).any(-1)
    distance = jnp.abs(jnp.arange(lax.axis_size(axes), dtype=jnp.int32) - lax.axis_index(axes))
    return lax.pmax(jnp.max(jnp.where(meets, distance, 0)), (*axes, *rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(
    ring: Ring,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segments: Int[Array, "B S"],
    reached: Int[Array, ""],
) -> Float[Array, "B S H D"]:
    """Return `jvlm_kernels.segment_attention` of a sequence to itself. Runs inside `jax.shard_map`.

    Args:
      q, k, v, segments: this device's shard of the sequence.
      reached: `reach`, at most `Ring.limit`. Devices that disagreed would wait for one another for ever.
    """
    return _forward(ring, q, k, v, segments, reached)[0]


def _forward(ring: Ring, q, k, v, segments, reached):
    """Return (out, logsumexp)."""
    own = _Shard(k, v, segments)

    def attend(distance, keys: _Shard):
        arguments = ring.arguments(distance, q.shape[1])
        return segment_attention(q, keys.k, keys.v, segments, keys.segments, return_logsumexp=True, **arguments)

    def step(distance, keys, carry):
        return keys, _merged(*carry, *attend(distance, keys))

    out, logsumexp = attend(0, own)
    carry = out.astype(jnp.float32), logsumexp
    for direction in _directions(ring):
        _, carry = _travel(ring, direction, reached, step, own, carry)
    return carry[0].astype(q.dtype), carry[1]


def _ring_forward(ring, q, k, v, segments, reached):
    out, logsumexp = _forward(ring, q, k, v, segments, reached)
    out, logsumexp = (checkpoint_name(x, name) for x, name in zip((out, logsumexp), RESIDUAL_NAMES, strict=True))
    return out, (q, k, v, segments, reached, out, logsumexp)


def _ring_backward(ring, saved, d_out):
    q, k, v, segments, reached, out, logsumexp = saved

    def gradients(distance, keys: _Shard):
        arguments = ring.arguments(distance, q.shape[1])
        found = segment_attention_gradients(
            q, keys.k, keys.v, segments, keys.segments, out, logsumexp, d_out, **arguments
        )
        return tuple(x.astype(jnp.float32) for x in found)

    def step(distance, keys: _Shard, d_q):
        more, *of_keys = gradients(distance, keys)
        summed = tuple(a + b for a, b in zip(keys.gradients, of_keys, strict=True))
        return keys._replace(gradients=summed), d_q + more

    d_q, *totals = gradients(0, _Shard(k, v, segments))
    none = tuple(jnp.zeros_like(x) for x in totals)
    for direction in _directions(ring):
        keys, d_q = _travel(ring, direction, reached, step, _Shard(k, v, segments, none), d_q)
        back = _back_home(ring, direction, reached, keys.gradients)
        totals = [a + b for a, b in zip(totals, back, strict=True)]
    return d_q.astype(q.dtype), totals[0].astype(k.dtype), totals[1].astype(v.dtype), None, None


ring_attention.defvjp(_ring_forward, _ring_backward)


def _directions(ring: Ring) -> tuple[int, ...]:
    """Return the ways that shards travel: to the devices behind which they lie, and without a causal mask also back."""
    return () if ring.limit == 0 else (1,) if ring.causal else (1, -1)


def _travel(
    ring: Ring, direction: int, reached, step: Callable[[Any, _Shard, C], tuple[_Shard, C]], own: _Shard, carry: C
) -> tuple[_Shard, C]:
    """Run ``keys, carry = step(distance, keys, carry)`` for each shard in reach; return the last keys and the carry.

    The distance counts shards, and is negative for those ahead. Keys and values for the next distance are on their way
    meanwhile; gradients follow them. Shards that have gone round the end of the sequence have no segments.
    """
    rank, count = lax.axis_index(ring.axes), lax.axis_size(ring.axes)

    def at(distance, keys: _Shard, carry: C):
        owner = rank - direction * distance
        inside = (owner >= 0) & (owner < count)
        seen = keys._replace(segments=jnp.where(inside, keys.segments, 0))
        after, carry = step(direction * distance, seen, carry)
        return keys._replace(gradients=after.gradients), carry

    def on(distance, keys, carry):
        after, carry = at(distance, keys, carry)
        return _shifted(ring, direction, keys._replace(gradients=after.gradients)), carry

    # while this device attends to its own; gradients, of which there are none yet, stay
    keys = _shifted(ring, direction, own._replace(gradients=None))._replace(gradients=own.gradients)
    state = lax.fori_loop(
        1,
        ring.limit,
        lambda distance, state: lax.cond(distance < reached, lambda s: on(distance, *s), lambda s: s, state),
        (keys, carry),
    )
    return lax.cond(reached > 0, lambda s: at(reached, *s), lambda s: s, state)


def _back_home(ring: Ring, direction: int, reached, gradients):
    """Return gradients that have travelled `reached` shards, at least one, to where they began, the shorter way."""
    count = lax.axis_size(ring.axes)
    hops = jnp.maximum(reached, 1)

    def shifted(way: int, most: int, hops, values):
        def one(number, values):
            return lax.cond(number < hops, lambda x: _shifted(ring, way, x), lambda x: x, values)

        return lax.fori_loop(0, most, one, values)

    def back(values):
        return shifted(-direction, min(ring.limit, count // 2), hops, values)

    def on(values):
        return shifted(direction, (count - 1) // 2, count - hops, values)

    if ring.limit <= count // 2:
        return back(gradients)
    return lax.cond(hops <= count // 2, back, on, gradients)


def _shifted(ring: Ring, direction: int, values: C) -> C:
    """Return what the neighbour before (direction 1) or behind (-1) has; the ends are neighbours."""
    count = lax.axis_size(ring.axes)
    pairs = [(number, (number + direction) % count) for number in range(count)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axes, pairs), values)


def _merged(out, logsumexp, more, more_logsumexp):
    """Return attention to two disjoint sets of keys from that to each; the first output is float32 and stays so."""
    total = jnp.logaddexp(logsumexp, more_logsumexp)
    top = jnp.where(jnp.isfinite(total), total, 0.0)
    shares = (jnp.exp(x - top)[..., None] for x in (logsumexp, more_logsumexp))
    return sum(x * share for x, share in zip((out, more), shares, strict=True)), total

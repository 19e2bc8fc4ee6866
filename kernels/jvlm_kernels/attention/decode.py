"""Attention of one new token per row to a cache of keys and values, which is updated in place.

Shapes: B rows, T places, H query heads, K key/value heads (H a multiple of K), D head size. The cache holds keys as
[B, K, D, T] and values as [B, K, T, D]: what the two matrix products read, so that no step transposes the cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Cache = tuple[Float[Array, "B K D T"], Float[Array, "B K T D"]]


def open_cache(k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], places: int) -> Cache:
    """A cache of ``places`` >= S places that begins with the keys and values of a prompt."""
    empty = places - k.shape[1]
    k_BKDS, v_BKSD = jnp.transpose(k, (0, 2, 3, 1)), jnp.transpose(v, (0, 2, 1, 3))
    return (
        jnp.pad(k_BKDS, ((0, 0), (0, 0), (0, 0), (0, empty))),
        jnp.pad(v_BKSD, ((0, 0), (0, 0), (0, empty), (0, 0))),
    )


def cached_attention(
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B 1 K D"],
    v: Float[Array, "B 1 K D"],
    cache: Cache,
    place: Int[Array, " B"],
    visible: Int[Array, "B T"],
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B 1 H D"], Cache]:
    """Write k and v at ``place`` of the cache, then attend to the places with ``visible`` > 0.

    Scores and softmax are float32. A row must see at least one place.

    Raises:
      ValueError: more than one new token a row.
    """
    B, S, H, D = q.shape
    if S != 1:
        raise ValueError(f"cached_attention takes one new token a row, got {S}")
    K = k.shape[2]
    # One index for each head: XLA keeps this a scatter and runs it in place. With one for each row, a batch of one
    # becomes a slice update, which CPU fuses into the products below and pays for with copies of the whole cache.
    row, head = jnp.arange(B)[:, None], jnp.arange(K)
    keys = cache[0].at[row, head, :, place[:, None]].set(k[:, 0])
    values = cache[1].at[row, head, place[:, None]].set(v[:, 0])
    q_BKGD = q.reshape(B, K, H // K, D) * (D**-0.5 if scale is None else scale)
    scores = jnp.einsum("bkgd,bkdt->bkgt", q_BKGD, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None] > 0, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bkgt,bktd->bkgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(q.shape), (keys, values)

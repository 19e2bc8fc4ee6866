"""Decode attention in plain XLA operations, on every device: the scores of the whole cache, masked.

Shapes as in `jvlm_kernels.decode.api`; X = G * S queries of a key head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jvlm_kernels.constants import MASK_VALUE

PLATFORM = None


def check(spec, q, keys, values) -> None:
    """Accept every call."""


def attend(spec, q, keys, values, lengths, tables):
    """Return (out [B, S, H, D],)."""
    B, S, H, D = q.shape
    if spec.paged:
        keys, values = _gather_pages(keys, values, tables)
    keys, values = keys.astype(q.dtype), values.astype(q.dtype)  # a cache may be narrower than the queries
    K, T = keys.shape[1], keys.shape[3]
    position_BS = lengths[:, None] - S + jnp.arange(S)
    distance_BST = position_BS[:, :, None] - jnp.arange(T)
    visible_BST = distance_BST >= 0
    if spec.window is not None:
        visible_BST &= distance_BST < spec.window
    # for one new token, a reshape that moves nothing
    q_BKXD = jnp.moveaxis(q.reshape(B, S, K, H // K, D), 1, 3).reshape(B, K, -1, D)
    scores = jnp.einsum("bkxd,bkdt->bkxt", q_BKXD * spec.scale, keys, preferred_element_type=jnp.float32)
    mask = jnp.tile(visible_BST, (1, H // K, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, MASK_VALUE), axis=-1)
    out = jnp.einsum("bkxt,bktd->bkxd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    out = jnp.moveaxis(out.reshape(B, K, H // K, S, D), 3, 1).reshape(q.shape)
    return (jnp.where(position_BS[:, :, None, None] >= 0, out, 0.0).astype(q.dtype),)


def _gather_pages(keys, values, tables):
    """Return the pages of each sequence side by side: keys [B, K, D, N * Z], values [B, K, N * Z, D]."""
    K, D, Z = keys.shape[1:]
    B, N = tables.shape
    # one gather index for each head, so that values come in their order and are not copied once more
    at = tables[:, None, :], jnp.arange(K)[None, :, None]
    k_BKNDZ, v_BKNZD = keys[at], values[at]
    return jnp.moveaxis(k_BKNDZ, 2, 3).reshape(B, K, D, N * Z), v_BKNZD.reshape(B, K, N * Z, D)

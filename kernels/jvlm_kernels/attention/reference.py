"""Attention written for reading: one full mask, float32 throughout. The oracle of the other implementations."""

from __future__ import annotations

import jax.numpy as jnp


def check(spec, q, k, v) -> None:
    """Runs everywhere."""


def attention(spec, q, k, v, q_segments, kv_segments):
    return reference_attention(
        q, k, v, q_segments, kv_segments, causal=spec.causal, window=spec.window, scale=spec.scale
    )


def reference_attention(q, k, v, q_segments, kv_segments, *, causal=False, window=None, scale=None):
    """(out [B, S, H, D], logsumexp [B, S, H]) of `segment_attention`, with an [S, T] mask in memory."""
    groups = q.shape[2] // k.shape[2]
    k_BTHD = jnp.repeat(k, groups, axis=2).astype(jnp.float32)
    v_BTHD = jnp.repeat(v, groups, axis=2).astype(jnp.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores_BHST = jnp.einsum("bshd,bthd->bhst", q.astype(jnp.float32), k_BTHD) * scale
    visible_BST = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] > 0)
    distance_ST = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None, :]
    if causal:
        visible_BST &= distance_ST >= 0
    if window is not None:
        visible_BST &= jnp.abs(distance_ST) < window
    visible = visible_BST[:, None]
    top = jnp.max(jnp.where(visible, scores_BHST, -jnp.inf), axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores_BHST - top, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bhst,bthd->bshd", weights, v_BTHD).astype(q.dtype)
    logsumexp = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + top, -jnp.inf)
    return out, logsumexp[..., 0].transpose(0, 2, 1)

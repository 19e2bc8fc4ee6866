"""Attention written for reading: one full mask, float32 throughout. The oracle of the other implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

PLATFORM = None


def check(spec, q, k, v) -> None:
    """Accept every call."""


def forward(spec, q, k, v, q_segments, kv_segments, offsets):
    """Return (out [B, S, H, D], logsumexp [B, S, H])."""
    mask = {"causal": spec.causal, "window": spec.window, "q_offset": offsets}
    return reference_attention(q, k, v, q_segments, kv_segments, scale=spec.scale, **mask)


def backward(spec, q, k, v, q_segments, kv_segments, offsets, out, logsumexp, d_out, d_logsumexp):
    """Return (dq, dk, dv), by differentiating the forward pass; ``out`` may be of more keys than these."""

    def of_these_keys(q, k, v):
        return forward(spec, q, k, v, q_segments, kv_segments, offsets)

    (own, own_logsumexp), pull = jax.vjp(of_these_keys, q, k, v)
    total = jnp.where(jnp.isfinite(logsumexp), logsumexp, 0.0)
    share = jnp.where(jnp.isfinite(own_logsumexp), jnp.exp(own_logsumexp - total), 0.0)
    by_share = ((own - out).astype(jnp.float32) * d_out).sum(-1) + d_logsumexp
    return pull(((share[..., None] * d_out).astype(own.dtype), share * by_share))


def reference_attention(q, k, v, q_segments, kv_segments, *, causal=False, window=None, scale=None, q_offset=0):
    """Return what `segment_attention` returns with its logsumexp, computed with an [S, T] mask in memory.

    Args are those of `segment_attention`.
    """
    groups = q.shape[2] // k.shape[2]
    k_BTHD = jnp.repeat(k, groups, axis=2).astype(jnp.float32)
    v_BTHD = jnp.repeat(v, groups, axis=2).astype(jnp.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores_BHST = jnp.einsum("bshd,bthd->bhst", q.astype(jnp.float32), k_BTHD) * scale
    visible_BST = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] > 0)
    q_index_BS = jnp.arange(q.shape[1]) + jnp.reshape(q_offset, (-1, 1))
    distance_BST = q_index_BS[:, :, None] - jnp.arange(k.shape[1])
    if causal:
        visible_BST &= distance_BST >= 0
    if window is not None:
        visible_BST &= jnp.abs(distance_BST) < window
    visible = visible_BST[:, None]
    maximum = jnp.max(jnp.where(visible, scores_BHST, -jnp.inf), axis=-1, keepdims=True)
    maximum = jnp.where(jnp.isfinite(maximum), maximum, 0.0)
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores_BHST - maximum, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bhst,bthd->bshd", weights, v_BTHD).astype(q.dtype)
    logsumexp = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + maximum, -jnp.inf)
    return out, logsumexp[..., 0].transpose(0, 2, 1)

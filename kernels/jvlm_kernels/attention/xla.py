"""Attention in plain XLA operations: runs on every device and differentiates by itself.

Three strategies, chosen in `_plan` and nowhere else:

- dense: all S x T scores at once, for short rows and for decoding;
- local: with a promised segment length M, blocks of M queries see the neighbouring blocks only, so cost and memory
  follow S * M; this is what the 64-patch windows of a ViT and packed short conversations use;
- chunked: blocks of queries one after the other, each recomputed in the backward pass, so memory follows S.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Largest S * T computed at once. Above it the scores of one head no longer fit a core's cache.
_DENSE_SCORES = 768 * 768
_CHUNK = 256


def check(spec, q, k, v) -> None:
    """Runs everywhere."""


def attention(spec, q, k, v, q_segments, kv_segments):
    strategy = _plan(spec, q.shape[1], k.shape[1])
    return strategy(spec, q, k, v, q_segments, kv_segments)


def _plan(spec, S: int, T: int):
    M = spec.max_segment_length
    blocks = 2 if spec.causal else 3
    if M is not None and blocks * M < T:
        return _local
    return _dense if S == 1 or S * T <= _DENSE_SCORES else _chunked


def _dense(spec, q, k, v, q_segments, kv_segments):
    q_index, kv_index = jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
    return _block(spec, q, k, v, q_segments, kv_segments, q_index, kv_index)


def _block(spec, q, k, v, q_segments, kv_segments, q_index, kv_index):
    """One dense block. Leading axes of any number; indices give the places in the row."""
    K = k.shape[-2]
    q_SKGD = q.reshape(*q.shape[:-2], K, q.shape[-2] // K, q.shape[-1])
    scores = jnp.einsum("...skgd,...tkd->...kgst", q_SKGD * spec.scale, k, preferred_element_type=jnp.float32)
    visible = (q_segments[..., :, None] == kv_segments[..., None, :]) & (q_segments[..., :, None] > 0)
    distance = q_index[..., :, None] - kv_index[..., None, :]
    if spec.causal:
        visible &= distance >= 0
    if spec.window is not None:
        visible &= jnp.abs(distance) < spec.window
    visible = visible[..., None, None, :, :]
    # A large finite value, not -inf: rows that see nothing stay finite and are zeroed below, gradients included.
    scores = jnp.where(visible, scores, -1e30)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    sees = top > -1e29
    weights = weights * jnp.where(sees, 1.0 / total, 0.0)
    out = jnp.einsum("...kgst,...tkd->...skgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    logsumexp = jnp.where(sees, jnp.log(total) + top, -jnp.inf)[..., 0]
    logsumexp = jnp.moveaxis(logsumexp, -1, -3)
    return out.astype(q.dtype).reshape(q.shape), logsumexp.reshape(*q.shape[:-1])


def _local(spec, q, k, v, q_segments, kv_segments):
    B, S, M = q.shape[0], q.shape[1], spec.max_segment_length
    count = -(-S // M)
    pad = count * M - S

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, count, M, *x.shape[2:])

    def neighbours(x):
        x = split(x)
        edge = jnp.zeros_like(x[:, :1])
        parts = [jnp.concatenate([edge, x[:, :-1]], 1), x]
        if not spec.causal:
            parts.append(jnp.concatenate([x[:, 1:], edge], 1))
        return jnp.concatenate(parts, 2)

    index = jnp.arange(count * M).reshape(count, M)
    around = jnp.arange(-M, M if spec.causal else 2 * M)
    out, logsumexp = _block(
        spec,
        split(q),
        neighbours(k),
        neighbours(v),
        split(q_segments),
        neighbours(kv_segments),
        index,
        index[:, :1] + around,
    )
    return out.reshape(B, count * M, *q.shape[2:])[:, :S], logsumexp.reshape(B, count * M, -1)[:, :S]


def _chunked(spec, q, k, v, q_segments, kv_segments):
    B, S = q.shape[:2]
    count = -(-S // _CHUNK)
    pad = count * _CHUNK - S

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, count, _CHUNK, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(_, inputs):
        q_chunk, segments_chunk, index = inputs
        return None, _block(spec, q_chunk, k, v, segments_chunk, kv_segments, index, jnp.arange(k.shape[1]))

    index = jnp.arange(count * _CHUNK).reshape(count, _CHUNK)
    _, (out, logsumexp) = jax.lax.scan(step, None, (chunks(q), chunks(q_segments), index))

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(B, count * _CHUNK, *x.shape[3:])[:, :S]

    return join(out), join(logsumexp)

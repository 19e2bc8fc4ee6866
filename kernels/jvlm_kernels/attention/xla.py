"""Attention in plain XLA operations, on every device.

Four strategies, chosen in `_plan` and nowhere else:

- dense: all S x T scores at once, for short rows and for decoding;
- staircase: each chunk of queries against the keys it can reach, for causal rows of moderate length: half the work;
- local: with a promised segment length M, blocks of M queries see the neighbouring blocks only, so cost and memory
  follow S * M; this is what the windows of a ViT use;
- chunked: one chunk of queries after the other, so memory follows S.

All end in `_block`, whose backward pass recomputes the scores instead of keeping them (as in FlashAttention, arXiv
2205.14135): on CPU that is faster than reading them back from memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Largest S * T computed at once.
_DENSE_SCORES = 768 * 768
_CHUNK = 256
# A staircase is unrolled: steps of at least so many queries, and at most so many steps.
_STEP, _STEPS = 128, 8
_HIDDEN = -1e30


def check(spec, q, k, v) -> None:
    """Runs everywhere."""


def attention(spec, q, k, v, q_segments, kv_segments):
    strategy = _plan(spec, q.shape[1], k.shape[1])
    return strategy(spec, q, k, v, q_segments, kv_segments)


def _plan(spec, S: int, T: int):
    M = spec.max_segment_length
    if M is not None and (2 if spec.causal else 3) * M < T:
        return _local
    if spec.causal and _STEP < S <= _STEP * _STEPS:
        return _staircase
    return _dense if S == 1 or S * T <= _DENSE_SCORES else _chunked


def _dense(spec, q, k, v, q_segments, kv_segments):
    q_index, kv_index = jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
    return _block(spec, q, k, v, q_segments, kv_segments, q_index, kv_index)


def _staircase(spec, q, k, v, q_segments, kv_segments):
    S = q.shape[1]
    reach = min(spec.max_segment_length or S, spec.window or S)
    index = jnp.arange(S)
    steps = []
    for start in range(0, S, _STEP):
        rows, keys = slice(start, min(start + _STEP, S)), slice(max(0, start - reach + 1), min(start + _STEP, S))
        step = (q[:, rows], k[:, keys], v[:, keys], q_segments[:, rows], kv_segments[:, keys])
        steps.append(_block(spec, *step, index[rows], index[keys]))
    return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*steps, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(spec, q, k, v, q_segments, kv_segments, q_index, kv_index):
    """One dense block. Leading axes of any number; indices give the places in the row."""
    scores = _scores(spec, q, k, q_segments, kv_segments, q_index, kv_index)
    top = scores.max(-1, keepdims=True)
    sees = top > 0.1 * _HIDDEN
    weights = jnp.exp(scores - top)
    total = weights.sum(-1)
    out = jnp.einsum("...kgst,...tkd->...skgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out * _queries_first(jnp.where(sees[..., 0], 1.0 / total, 0.0))[..., None]
    logsumexp = _queries_first(jnp.where(sees[..., 0], jnp.log(total) + top[..., 0], -jnp.inf))
    return out.astype(q.dtype).reshape(q.shape), logsumexp.reshape(q.shape[:-1])


def _scores(spec, q, k, q_segments, kv_segments, q_index, kv_index):
    """Scaled scores [..., K, G, S, T] in float32; those that must not be seen hold a large negative number."""
    scores = jnp.einsum("...skgd,...tkd->...kgst", _grouped(q, k), k, preferred_element_type=jnp.float32)
    visible = (q_segments[..., :, None] == kv_segments[..., None, :]) & (q_segments[..., :, None] > 0)
    distance = q_index[..., :, None] - kv_index[..., None, :]
    if spec.causal:
        visible &= distance >= 0
    if spec.window is not None:
        visible &= jnp.abs(distance) < spec.window
    return jnp.where(visible[..., None, None, :, :], scores * spec.scale, _HIDDEN)


def _grouped(x, k):
    """[..., S, H, D] to [..., S, K, G, D]."""
    K = k.shape[-2]
    return x.reshape(*x.shape[:-2], K, x.shape[-2] // K, x.shape[-1])


def _queries_first(x):
    """[..., K, G, S] to [..., S, K, G]."""
    return jnp.moveaxis(x, -1, -3)


def _block_forward(spec, q, k, v, *places):
    out, logsumexp = _block(spec, q, k, v, *places)
    return (out, logsumexp), (q, k, v, places, out, logsumexp)


def _block_backward(spec, saved, cotangents):
    q, k, v, places, out, logsumexp = saved
    d_out, d_logsumexp = cotangents
    scores = _scores(spec, q, k, *places)
    # Queries that see nothing have a logsumexp of -inf: 0 in its place makes every weight exp(-1e30) = 0.
    seen = jnp.isfinite(logsumexp)
    normaliser = jnp.moveaxis(_grouped_heads(jnp.where(seen, logsumexp, 0.0), k), -3, -1)[..., None]
    weights = jnp.exp(scores - normaliser)
    d_out_32 = d_out.astype(jnp.float32)
    delta = (d_out_32 * out.astype(jnp.float32)).sum(-1) - jnp.where(seen, d_logsumexp, 0.0)
    d_out_SKGD = _grouped(d_out.astype(v.dtype), k)
    d_v = jnp.einsum("...kgst,...skgd->...tkd", weights.astype(v.dtype), d_out_SKGD, preferred_element_type=jnp.float32)
    d_weights = jnp.einsum("...skgd,...tkd->...kgst", d_out_SKGD, v, preferred_element_type=jnp.float32)
    delta = jnp.moveaxis(_grouped_heads(delta, k), -3, -1)[..., None]
    d_scores = (weights * (d_weights - delta) * spec.scale).astype(q.dtype)
    d_q = jnp.einsum("...kgst,...tkd->...skgd", d_scores, k, preferred_element_type=jnp.float32)
    d_k = jnp.einsum("...kgst,...skgd->...tkd", d_scores, _grouped(q, k), preferred_element_type=jnp.float32)
    return d_q.reshape(q.shape).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, None, None


def _grouped_heads(x, k):
    """[..., S, H] to [..., S, K, G]."""
    K = k.shape[-2]
    return x.reshape(*x.shape[:-1], K, x.shape[-1] // K)


_block.defvjp(_block_forward, _block_backward)


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

    def step(_, inputs):
        q_chunk, segments_chunk, index = inputs
        return None, _block(spec, q_chunk, k, v, segments_chunk, kv_segments, index, jnp.arange(k.shape[1]))

    index = jnp.arange(count * _CHUNK).reshape(count, _CHUNK)
    _, (out, logsumexp) = jax.lax.scan(step, None, (chunks(q), chunks(q_segments), index))

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(B, count * _CHUNK, *x.shape[3:])[:, :S]

    return join(out), join(logsumexp)

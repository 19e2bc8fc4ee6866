"""Gated cross-attention layers: text reads the features of pictures instead of holding them among its tokens.

Flamingo (arXiv 2204.14198) and Idefics1, compared with features in the text by Idefics2's paper (arXiv 2405.02246). The
gates begin at zero, so that a language model is at first what it was without pictures.

Axes: B rows, S tokens, F features, D width, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jvlm.models import device_ops, layers

Reach = Literal["last", "all"]


class Media(NamedTuple):
    """Features of a batch, and which of them each token may read: those of frames ``first`` to ``last`` of the row.

    Attributes:
      frames: the frame of each feature, from 1; 0 for room that no frame fills.
      first, last: 0 where there is nothing to read.
    """

    features: Float[Array, "B F D"]
    frames: Int[Array, "B F"]
    first: Int[Array, "B S"]
    last: Int[Array, "B S"]


def frames_in_reach(
    opened: Int[Array, "B S"], segments: Int[Array, "B S"], reach: Reach
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """(first, last) frame that each token reads: those of its own conversation at or before it, or the last of them.

    Args:
      opened: frame that stands at this token, 0 for none; frames ascend along the row.
    """
    last = jax.lax.cummax(opened, axis=1)
    before = jnp.pad(last, ((0, 0), (1, 0)))[:, :-1]
    begins = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    of_others = jax.lax.cummax(jnp.where(begins, before, 0), axis=1)
    last = jnp.where((last > of_others) & (segments > 0), last, 0)
    first = last if reach == "last" else jnp.where(last > 0, of_others + 1, 0)
    return first, last


class GatedCrossAttention(nnx.Module):
    """Norm, attention to features, tanh gate, residual; norm, SwiGLU, tanh gate, residual.

    What it keeps of a prompt: keys and values of the features, and which of them the text to come reads.
    """

    def __init__(self, config: Any, *, precision: layers.Precision, rngs: nnx.Rngs):
        D, self.head_size, self.reach = config.hidden_size, config.head_size, config.cross_attention_reach
        self.heads, self.kv_heads, self.implementation = config.num_heads, config.num_kv_heads, precision.attention
        common = {"bias": False, "precision": precision, "rngs": rngs}
        self.norm1 = layers.RMSNorm(D, config.rms_norm_eps, precision=precision)
        self.q = layers.Linear(D, self.heads * self.head_size, ("embed", "heads"), **common)
        self.k = layers.Linear(D, self.kv_heads * self.head_size, ("embed", "kv_heads"), **common)
        self.v = layers.Linear(D, self.kv_heads * self.head_size, ("embed", "kv_heads"), **common)
        self.out = layers.Linear(self.heads * self.head_size, D, ("heads", "embed"), **common)
        self.norm2 = layers.RMSNorm(D, config.rms_norm_eps, precision=precision)
        self.mlp = layers.SwiGLU(D, config.intermediate_size, **common)
        dtype = jnp.dtype(precision.param_dtype)
        self.attention_gate = nnx.Param(jnp.zeros((1,), dtype), axes=("norm",))
        self.mlp_gate = nnx.Param(jnp.zeros((1,), dtype), axes=("norm",))

    @jax.named_scope("cross_attention")
    def __call__(self, x_BSD, media: Media | None, kept):
        """``media`` in a whole pass, ``kept`` in a step of decoding; neither where a batch has no pictures."""
        if media is not None:
            B, F, _ = media.features.shape
            k, v = (p(media.features).reshape(B, F, self.kv_heads, self.head_size) for p in (self.k, self.v))
            first, last = (x.max(1, keepdims=True) for x in (media.first, media.last))
            seen = (media.frames >= first) & (media.frames <= last) & (media.frames > 0)
            kept = (*(device_ops.current().expand_kv_heads(x, self.heads) for x in (k, v)), seen.astype(jnp.int32))
            mixed = self._read(self._queries(x_BSD), k, v, media)
            x_BSD = self._add(x_BSD, mixed)
        elif kept is not None:
            k, v, seen = kept
            own = jnp.ones(x_BSD.shape[:2], jnp.int32)
            x_BSD = self._add(x_BSD, self._attend(self._queries(x_BSD), k, v, own, seen))
        gate = jnp.tanh(self.mlp_gate[...]).astype(x_BSD.dtype)
        return x_BSD + gate * self.mlp(self.norm2(x_BSD)), kept

    def _queries(self, x_BSD):
        return self.q(self.norm1(x_BSD)).reshape(*x_BSD.shape[:2], self.heads, self.head_size)

    def _add(self, x_BSD, mixed_BSHd):
        mixed = self.out(mixed_BSHd.reshape(*x_BSD.shape[:2], -1))
        return x_BSD + jnp.tanh(self.attention_gate[...]).astype(x_BSD.dtype) * mixed

    def _read(self, q, k, v, media: Media):
        if self.reach == "last":
            return self._attend(q, k, v, media.last, media.frames)
        return _masked_attention(q, k, v, media)

    def _attend(self, q, k, v, q_segments, kv_segments):
        return device_ops.current().attention(
            q, k, v, q_segments, kv_segments, along="sequence", implementation=self.implementation
        )


def _masked_attention(q, k, v, media: Media):
    """Every frame so far of one's own conversation: no kernel's pattern, so all S x F scores are made."""
    B, S, H, d = q.shape
    frames = media.frames[:, None, :]
    mask = (frames >= media.first[..., None]) & (frames <= media.last[..., None]) & (frames > 0)
    q_BSKGd = q.reshape(B, S, k.shape[2], -1, d)
    scores = jnp.einsum("bskgd,bfkd->bskgf", q_BSKGd, k, preferred_element_type=jnp.float32) * d**-0.5
    mask = mask[:, :, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
    # a token that sees no picture gets zeros, not the mean of what it must not see
    weights = jnp.where(mask, weights, 0).astype(v.dtype)
    return jnp.einsum("bskgf,bfkd->bskgd", weights, v).reshape(B, S, H, d)

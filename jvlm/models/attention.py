"""Multi-head attention for every tower: self- and cross-attention, grouped keys, QK norm, rotary embedding, cache.

Axes: B sequences, S queries, T keys, D width, H query heads, N key/value heads, K size of a head, f = K / 2.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jvlm.models import device_ops, layers
from jvlm.models.batch import CacheSizes, DecodeStep, PrefillStep
from jvlm.models.device_ops import KVCache, Layer, SequenceAxis


class Attention(nnx.Module):
    """Projections to queries, keys and values, attention within segments, and the output projection.

    Args:
      head_dim: None is width / num_heads.
      num_kv_heads: None is num_heads.
      qkv_bias, out_bias: whether the projections have biases.
      qk_norm_eps: of an RMSNorm on each head of queries and keys, before the rotation; None has no norm.
      fused_qkv: one matrix for queries, keys and values, head by head, so that a shard of its outputs is whole heads;
        needs as many key heads as query heads.
      along: logical axis of queries and keys ("patches" in an encoder).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
        fused_qkv: bool = False,
        along: SequenceAxis = "sequence",
        precision: layers.Precision,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim, self.along, self.implementation = head_dim or width // num_heads, along, precision.attention
        if fused_qkv and self.num_kv_heads != num_heads:
            raise ValueError(f"fused_qkv needs as many key heads as query heads, got {num_kv_heads} and {num_heads}")
        q_width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        common = {"precision": precision, "rngs": rngs}
        if fused_qkv:
            self.qkv_by_head = layers.Linear(width, 3 * q_width, ("embed", "heads"), bias=qkv_bias, **common)
        else:
            self.qkv_by_head = None
            self.q = layers.Linear(width, q_width, ("embed", "heads"), bias=qkv_bias, **common)
            self.k = layers.Linear(width, kv_width, ("embed", "kv_heads"), bias=qkv_bias, **common)
            self.v = layers.Linear(width, kv_width, ("embed", "kv_heads"), bias=qkv_bias, **common)
        self.out = layers.Linear(q_width, width, ("heads", "embed"), bias=out_bias, **common)
        norms = [None, None]
        if qk_norm_eps is not None:
            norms = [layers.RMSNorm(self.head_dim, qk_norm_eps, precision=precision) for _ in norms]
        self.q_norm, self.k_norm = norms

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "B S D"],
        segments: Int[Array, "B S"],
        *,
        rotary: layers.RotaryEmbedding | None = None,
        context: tuple[Float[Array, "B T D"], Int[Array, "B T"]] | None = None,
        **mask: Any,
    ) -> Float[Array, "B S D"]:
        """Return what each query reads of its segment, after the output projection.

        Args:
          rotary: of each token; None rotates nothing.
          context: what keys and values are made of, and its segments; None is ``x`` itself.
          mask: options of `jvlm_kernels.segment_attention`: ``causal``, ``window``, ``max_segment_length``.
        """
        keys, key_segments = context or (None, segments)
        q, k, v = self.project(x, keys, rotary=rotary)
        return self.combine(self.attend(q, k, v, segments, key_segments, **mask))

    def project(
        self,
        x: Float[Array, "B S D"],
        context: Float[Array, "B T D"] | None = None,
        *,
        rotary: layers.RotaryEmbedding | None = None,
        decoding: bool = False,
    ) -> tuple[Float[Array, "B S H K"], Float[Array, "B T N K"], Float[Array, "B T N K"]]:
        """Return queries of ``x``, and keys and values of the context (None: of ``x``), normed and rotated."""
        if self.qkv_by_head is None:
            q = self.queries(x, decoding=decoding)
            k, v = self.keys_values(x if context is None else context)
        else:
            qkv = self.qkv_by_head(x).reshape(*x.shape[:2], self.num_heads, 3, self.head_dim)
            q, k, v = (qkv[..., part, :] for part in range(3))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = layers.rotate(q, rotary), layers.rotate(k, rotary)
        return q, k, v

    def queries(self, x: Float[Array, "B S D"], *, decoding: bool = False) -> Float[Array, "B S H K"]:
        """Return queries before norm and rotation. ``decoding``: there is one query for each sequence."""
        q = self.q(x)
        if decoding:
            # else XLA for TPU turns the weight around, a copy in every step, to have its product by heads at once
            q = jax.lax.optimization_barrier(q)
        return q.reshape(*x.shape[:2], self.num_heads, self.head_dim)

    def keys_values(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N K"], Float[Array, "B T N K"]]:
        """Return keys and values before norm and rotation."""
        shape = (*x.shape[:2], self.num_kv_heads, self.head_dim)
        return self.k(x).reshape(shape), self.v(x).reshape(shape)

    def attend(
        self,
        q: Float[Array, "B S H K"],
        k: Float[Array, "B T N K"],
        v: Float[Array, "B T N K"],
        q_segments: Int[Array, "B S"],
        kv_segments: Int[Array, "B T"],
        **mask: Any,
    ) -> Float[Array, "B S H K"]:
        """Return what each query reads, head by head. For self-attention pass the same array of segments twice."""
        return device_ops.current().attention(
            q, k, v, q_segments, kv_segments, along=self.along, implementation=self.implementation, **mask
        )

    def combine(self, mixed: Float[Array, "B S H K"]) -> Float[Array, "B S D"]:
        """Return the output projection of all heads."""
        return self.out(mixed.reshape(*mixed.shape[:2], -1))

    @jax.named_scope("attention")
    def prefill(
        self,
        x: Float[Array, "B S D"],
        segments: Int[Array, "B S"],
        cache: KVCache,
        layer: Layer,
        step: PrefillStep,
        rotary: layers.RotaryEmbedding,
        **mask: Any,
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """Return self-attention of chunks of prompts that are written into a cache, and the cache."""
        q, k, v = self.project(x, rotary=rotary)
        mixed, cache = device_ops.current().chunk_attention(
            q,
            k,
            v,
            segments,
            cache,
            layer,
            step.pages,
            step.past_pages,
            step.past_segments,
            implementation=self.implementation,
            **mask,
        )
        return self.combine(mixed), cache

    @jax.named_scope("attention")
    def decode(
        self,
        x: Float[Array, "B S D"],
        cache: KVCache,
        layer: Layer,
        step: DecodeStep,
        rotary: layers.RotaryEmbedding,
        **mask: Any,
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """Return self-attention of new tokens that are written into a cache, and the cache."""
        q, k, v = self.project(x, rotary=rotary, decoding=True)
        ops = device_ops.current()
        mixed, cache = ops.cached_attention(q, k, v, cache, layer, step.cache_index, step.block_tables, **mask)
        return self.combine(mixed), cache

    def init_cache(self, layers: int, sizes: CacheSizes, dtype: DTypeLike) -> KVCache:
        """Return an empty cache of pages, of so many layers with this attention."""
        heads = self.num_heads, self.num_kv_heads, self.head_dim
        return device_ops.current().init_pages(layers, sizes.pages, sizes.page_size, *heads, dtype)

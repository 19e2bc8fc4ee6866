"""Gated cross-attention: text reads the vision tokens of images instead of holding them among its tokens.

As in Flamingo (arXiv 2204.14198) and Idefics1; Idefics2's paper (arXiv 2405.02246) compares it with tokens in the text.
The gates begin at zero, so that a language model at first computes what it did without images.

Axes: B sequences, S tokens, F vision tokens, D width, H query heads, N key/value heads, K size of a head.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jvlm.errors import UserError
from jvlm.models import device_ops, layers
from jvlm.models.arithmetic import Counts, Product, Work, attention_flops, attention_products, swiglu_products
from jvlm.models.attention import Attention
from jvlm.models.batch import CacheSizes, DecodeStep, PackedBatch, PrefillStep
from jvlm.models.contracts import DecoderInputs, VisionTokens
from jvlm.models.decoders.transformer import (
    Context,
    DecoderBlock,
    DecoderLayer,
    Transformer,
    TransformerConfig,
    refuse_deepstack,
)
from jvlm.models.device_ops import Layer
from jvlm.models.registry import register

AttendsTo = Literal["last", "all"]


@dataclasses.dataclass(frozen=True)
class CrossAttentionTransformerConfig(TransformerConfig, tag="cross_attention_transformer"):
    """A transformer that reads vision tokens through gated cross-attention layers.

    Attributes:
      cross_attention_every: such a layer stands before every n-th layer, the first included.
      attends_to: a token reads the last image before it in its conversation (Flamingo, Idefics1), or all before it.
    """

    cross_attention_every: int = 4
    attends_to: AttendsTo = "last"

    def __post_init__(self):
        if self.cross_attention_every < 1:
            raise UserError(f"cross_attention_every must be at least 1, got {self.cross_attention_every}")
        super().__post_init__()

    @classmethod
    def of(cls, decoder: TransformerConfig, **fields: Any) -> CrossAttentionTransformerConfig:
        """Return a transformer's configuration with cross-attention; ``fields`` are those of this class."""
        return cls(**{f.name: getattr(decoder, f.name) for f in dataclasses.fields(TransformerConfig)}, **fields)

    @property
    def pattern_length(self) -> int:
        return math.lcm(super().pattern_length, self.cross_attention_every)

    @property
    def vision_memory(self) -> AttendsTo:
        return self.attends_to

    def has_cross_attention(self, index: int) -> bool:
        """Return whether a cross-attention layer stands before layer ``index`` (from 0)."""
        return index % self.cross_attention_every == 0

    def work(self, counts: Counts, tokens_per_image: int | None) -> Work:
        """Return the arithmetic of a forward pass.

        Each token is counted as reading one image, as most do: text before the first image reads none.
        """
        per_image, own = self._tokens_per_image(tokens_per_image), super().work(counts, tokens_per_image)
        layers = self.num_layers // self.cross_attention_every
        pairs = layers * counts.tokens * per_image if len(counts.images) else 0
        products = self._cross_products(counts.tokens, per_image * len(counts.images))
        return Work((*own.products, *products), own.attention + attention_flops(pairs, self.attention_width))

    def decode_work(self, sequences: int, cache_len: int, tokens_per_image: int | None) -> Work:
        """Return the arithmetic of one new token for each sequence, which reads one image."""
        own = super().decode_work(sequences, cache_len, tokens_per_image)
        pairs = sequences * (self.num_layers // self.cross_attention_every) * self._tokens_per_image(tokens_per_image)
        products = self._cross_products(sequences, 0)
        return Work((*own.products, *products), own.attention + attention_flops(pairs, self.attention_width))

    def _cross_products(self, tokens: float | int, vision_tokens: float | int) -> tuple[Product, ...]:
        layers, D = self.num_layers // self.cross_attention_every, self.hidden_size
        kv_width = self.num_kv_heads * self.head_size
        return (
            *attention_products(layers * tokens, D, self.attention_width, kv_width, layers * vision_tokens),
            *swiglu_products(layers * tokens, D, self.intermediate_size),
        )

    @staticmethod
    def _tokens_per_image(tokens_per_image: int | None) -> int:
        if tokens_per_image is None:
            raise TypeError("the arithmetic of cross-attention to images of any number of tokens is not known")
        return tokens_per_image

    def placeholders(self, vision_tokens: int) -> int:
        """Return 1: an image is one token of the text, whatever the number of its vision tokens."""
        return 1


class VisionMemory(NamedTuple):
    """Vision tokens, and which of them each token reads: those of images ``first`` to ``last`` of its sequence.

    Attributes:
      image_ids: the image of each vision token, from 1; 0 where there is none.
      first, last: 0 for tokens that read nothing.
    """

    tokens: Float[Array, "B F D"]
    image_ids: Int[Array, "B F"]
    first: Int[Array, "B S"]
    last: Int[Array, "B S"]


def readable_images(
    image_at: Int[Array, "B S"], segments: Int[Array, "B S"], attends_to: AttendsTo
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """Return (first, last) image that each token reads, of those at or before it in its conversation; 0 for none.

    Args:
      image_at: the image whose placeholder stands at this token, 0 for none; images ascend along the sequence.
    """
    last = jax.lax.cummax(image_at, axis=1)
    before = jnp.pad(last, ((0, 0), (1, 0)))[:, :-1]
    begins = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    last_of_previous = jax.lax.cummax(jnp.where(begins, before, 0), axis=1)
    last = jnp.where((last > last_of_previous) & (segments > 0), last, 0)
    first = last if attends_to == "last" else jnp.where(last > 0, last_of_previous + 1, 0)
    return first, last


class GatedCrossAttention(nnx.Module):
    """Norm, attention to vision tokens, tanh gate, residual; norm, SwiGLU, tanh gate, residual.

    Its cache: for each layer and slot, keys and values of vision tokens, and 1 for those that the text to come reads.
    """

    def __init__(self, config: CrossAttentionTransformerConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        D, common = config.hidden_size, {"precision": precision, "rngs": rngs}
        self.attends_to, self.compute_dtype = config.attends_to, precision.compute_dtype
        self.norm1 = layers.RMSNorm(D, config.rms_norm_eps, precision=precision)
        self.attention = Attention(
            D, config.num_heads, head_dim=config.head_size, num_kv_heads=config.num_kv_heads, **common
        )
        self.norm2 = layers.RMSNorm(D, config.rms_norm_eps, precision=precision)
        self.mlp = layers.SwiGLU(D, config.intermediate_size, bias=False, **common)
        dtype = jnp.dtype(precision.param_dtype)
        self.attention_gate = nnx.Param(jnp.zeros((1,), dtype), axes=("norm",))
        self.mlp_gate = nnx.Param(jnp.zeros((1,), dtype), axes=("norm",))

    @jax.named_scope("cross_attention")
    def __call__(
        self, x_BSD, memory: VisionMemory | None, cache, number: Layer, step: PrefillStep | DecodeStep | None = None
    ):
        """Return (x, cache). ``memory`` is None without images, and while decoding, which reads the cache."""
        if memory is not None:
            q = self.attention.queries(self.norm1(x_BSD))
            k, v = self.attention.keys_values(memory.tokens)
            x_BSD = self._add(x_BSD, self._read(q, k, v, memory))
            cache = cache if step is None else _remember(k, v, cache, number, step.memory_index)
        elif isinstance(step, DecodeStep) and cache[0].shape[2]:
            k, v, readable = (part[number, step.slots] for part in cache)
            q = self.attention.queries(self.norm1(x_BSD))
            ones = jnp.ones(x_BSD.shape[:2], jnp.int32)
            x_BSD = self._add(x_BSD, self.attention.attend(q, k, v, ones, readable))
        gate = jnp.tanh(self.mlp_gate[...]).astype(x_BSD.dtype)
        return x_BSD + gate * self.mlp(self.norm2(x_BSD)), cache

    def init_cache(self, depth: int, sizes: CacheSizes):
        """Return the cache of slots that read nothing."""
        shape = (depth, sizes.slots, sizes.vision_tokens, self.attention.num_kv_heads, self.attention.head_dim)
        ops = device_ops.current()
        empty = jnp.zeros(shape, self.compute_dtype)
        k, v = (ops.constrain(empty, (None, "batch", None, "kv_heads", None)) for _ in range(2))
        return k, v, ops.constrain(jnp.zeros(shape[:3], jnp.int32), (None, "batch", None))

    def _add(self, x_BSD, mixed_BSHK):
        gate = jnp.tanh(self.attention_gate[...]).astype(x_BSD.dtype)
        return x_BSD + gate * self.attention.combine(mixed_BSHK)

    def _read(self, q, k, v, memory: VisionMemory):
        if self.attends_to == "last":
            return self.attention.attend(q, k, v, memory.last, memory.image_ids)
        return _masked_attention(q, k, v, memory)


def _remember(k, v, cache, number: Layer, index: Int[Array, "B s F"]):
    """Return the cache with those of this pass's vision tokens [B, V, ...] that ``index`` names for a layer's slots."""
    B, slots, F = index.shape
    ops = device_ops.current()
    at = jnp.maximum(index, 0).reshape(B, slots * F)

    def put(new, cached, axes):
        old = cached[number]
        found = jnp.take_along_axis(new, at[..., None, None], axis=1).reshape(B * slots, F, *new.shape[2:])
        kept, none = ((index == value).reshape(B * slots, F, 1, 1) for value in (-1, -2))
        changed = ops.constrain(jnp.where(kept, old, jnp.where(none, 0, found.astype(old.dtype))), axes)
        return cached.at[number].set(changed)

    axes = ("batch", None, "kv_heads", None)
    old = cache[2][number]
    readable = jnp.where(index == -1, old.reshape(index.shape), (index >= 0).astype(jnp.int32))
    readable = ops.constrain(readable.reshape(old.shape), axes[:2])
    return put(k, cache[0], axes), put(v, cache[1], axes), cache[2].at[number].set(readable)


def _masked_attention(q, k, v, memory: VisionMemory):
    """Attend to every image so far of the conversation. No kernel has this mask, so all S x F scores are computed."""
    B, S, H, K = q.shape
    image_ids = memory.image_ids[:, None, :]
    mask = (image_ids >= memory.first[..., None]) & (image_ids <= memory.last[..., None]) & (image_ids > 0)
    q_BSNGK = q.reshape(B, S, k.shape[2], -1, K)
    scores = jnp.einsum("bsngk,bfnk->bsngf", q_BSNGK, k, preferred_element_type=jnp.float32) * K**-0.5
    mask = mask[:, :, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
    # a token that reads no image gets zeros, not the mean of what it must not read
    weights = jnp.where(mask, weights, 0).astype(v.dtype)
    return jnp.einsum("bsngf,bfnk->bsngk", weights, v).reshape(B, S, H, K)


class CrossAttentionBlock(DecoderBlock):
    """A gated cross-attention layer, then a layer of the transformer. Its cache holds both."""

    def __init__(
        self, config: CrossAttentionTransformerConfig, index: int, *, precision: layers.Precision, rngs: nnx.Rngs
    ):
        self.cross = GatedCrossAttention(config, precision=precision, rngs=rngs)
        super().__init__(config, index, precision=precision, rngs=rngs)

    def __call__(self, x_BSD, context: Context, cache=None, number=None):
        cache, vision_cache = cache or (None, None)
        x_BSD, vision_cache = self.cross(x_BSD, context.memory, vision_cache, number, context.step)
        x_BSD, cache, reports = super().__call__(x_BSD, context, cache, number)
        return x_BSD, None if context.step is None else (cache, vision_cache), reports

    def init_cache(self, depth: int, sizes: CacheSizes, dtype: DTypeLike):
        return super().init_cache(depth, sizes, dtype), self.cross.init_cache(depth, sizes)


@register(CrossAttentionTransformerConfig)
class CrossAttentionTransformer(Transformer):
    """A `Transformer` with gated cross-attention layers."""

    @staticmethod
    def make_layer(
        config: CrossAttentionTransformerConfig, index: int, *, precision: layers.Precision, rngs: nnx.Rngs
    ) -> DecoderLayer:
        kind = CrossAttentionBlock if config.has_cross_attention(index) else DecoderBlock
        return kind(config, index, precision=precision, rngs=rngs)

    def fuse(self, embeddings: Float[Array, "B S D"], vision: VisionTokens | None, batch: PackedBatch) -> DecoderInputs:
        """Leave the text as it is; each token reads the images that its conversation has shown so far."""
        if vision is None:
            return DecoderInputs.of(embeddings, batch)
        refuse_deepstack(self, vision)
        index, segments = jnp.asarray(batch.vision_index), jnp.asarray(batch.segment_ids)
        ids = device_ops.current().gather_vision_tokens(vision.image_ids[..., None], index)[..., 0]
        images = readable_images(jnp.where(index >= 0, ids, 0), segments, self.config.attends_to)
        return DecoderInputs.of(embeddings, batch, VisionMemory(vision.tokens, vision.image_ids, *images))

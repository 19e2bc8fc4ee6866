"""The Qwen2 / MiMo decoder: grouped-query attention with biased q, k, v, SwiGLU, RMSNorm, M-RoPE.

Axes: B rows, S tokens, T places of a cache, D width, H query heads, K key/value heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from jvlm_kernels import cached_attention, open_cache

from jvlm.models import layers, placement
from jvlm.models.batch import DecodeStep
from jvlm.models.registry import DecoderConfig, register


@dataclasses.dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """Fields as in Hugging Face's ``text_config``. mrope_section is in frequencies: temporal, height, width."""

    vocab_size: int = 151680
    hidden_size: int = 4096
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    intermediate_size: int = 11008
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 128000

    def __post_init__(self):
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}, num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads} "
                "must divide one another"
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to half the head size {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class DecoderAttention(nnx.Module):
    def __init__(self, config: Qwen2Config, *, numerics: layers.Numerics, rngs: nnx.Rngs):
        D, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.implementation = numerics.attention
        common = {"numerics": numerics, "rngs": rngs}
        self.q = layers.Linear(D, self.heads * self.head_dim, ("embed", "heads"), bias=True, **common)
        self.k = layers.Linear(D, self.kv_heads * self.head_dim, ("embed", "kv_heads"), bias=True, **common)
        self.v = layers.Linear(D, self.kv_heads * self.head_dim, ("embed", "kv_heads"), bias=True, **common)
        self.out = layers.Linear(self.heads * self.head_dim, D, ("heads", "embed"), bias=False, **common)

    def __call__(self, x_BSD, angles, segments, max_length, cache, step: DecodeStep | None):
        B, S, _ = x_BSD.shape
        q = layers.rotate(self.q(x_BSD).reshape(B, S, self.heads, self.head_dim), angles)
        k = layers.rotate(self.k(x_BSD).reshape(B, S, self.kv_heads, self.head_dim), angles)
        v = self.v(x_BSD).reshape(B, S, self.kv_heads, self.head_dim)
        if step is None:
            cache = (k, v)
            mixed = placement.current().attention(
                q,
                k,
                v,
                segments,
                segments,
                along="sequence",
                causal=True,
                max_segment_length=max_length,
                implementation=self.implementation,
            )
        else:
            mixed, cache = cached_attention(q, k, v, cache, step.place)
        return self.out(layers.save_attention(mixed).reshape(B, S, -1)), cache


class DecoderBlock(nnx.Module):
    """Pre-norm block: causal attention, then SwiGLU."""

    def __init__(self, config: Qwen2Config, *, numerics: layers.Numerics, rngs: nnx.Rngs):
        self.norm1 = layers.RMSNorm(config.hidden_size, config.rms_norm_eps, numerics=numerics)
        self.attention = DecoderAttention(config, numerics=numerics, rngs=rngs)
        self.norm2 = layers.RMSNorm(config.hidden_size, config.rms_norm_eps, numerics=numerics)
        self.mlp = layers.SwiGLU(config.hidden_size, config.intermediate_size, bias=False, numerics=numerics, rngs=rngs)

    def __call__(self, x_BSD, angles, segments, max_length, cache, step):
        mixed, cache = self.attention(self.norm1(x_BSD), angles, segments, max_length, cache, step)
        x_BSD = x_BSD + mixed
        return x_BSD + self.mlp(self.norm2(x_BSD)), cache


@register(Qwen2Config)
class Qwen2Decoder(nnx.Module):
    """Token embeddings to hidden states and logits."""

    def __init__(self, config: Qwen2Config, *, numerics: layers.Numerics, rngs: nnx.Rngs):
        self.config = config
        self.numerics = numerics
        V, D = config.vocab_size, config.hidden_size
        self.embedding = nnx.Param(numerics.new_weight(rngs.params(), (V, D), D), axes=("vocab", "embed"))
        self.blocks = layers.LayerStack(
            lambda r: DecoderBlock(config, numerics=numerics, rngs=r), config.num_layers, rngs=rngs
        )
        self.norm = layers.RMSNorm(D, config.rms_norm_eps, numerics=numerics)
        self.head = (
            None
            if config.tie_word_embeddings
            else layers.Linear(D, V, ("embed", "vocab"), bias=False, numerics=numerics, rngs=rngs)
        )

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Embeddings of token ids, in the compute dtype."""
        return placement.current().lookup(self.embedding[...], tokens, self.numerics.compute_dtype)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        positions: Int[Array, "B S 3"],
        segments: Int[Array, "B S"],
        *,
        max_segment_length: int | None = None,
        cache: Any = None,
        step: DecodeStep | None = None,
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Hidden states after the last norm, and the keys and values of every layer.

        Without ``step``: the cache returned holds this call's keys and values. With it: the new token of each row
        is written into ``cache``, as `open_cache` made it, and sees what the step allows; segments are not used.
        """
        config = self.config
        axis_of = np.repeat([0, 1, 2], config.mrope_section)
        angles = layers.rotary_angles(positions, axis_of, layers.rotary_frequencies(config.head_dim, config.rope_theta))

        def body(block, x, layer_cache):
            return block(x, angles, segments, max_segment_length, layer_cache, step)

        if cache is None and layers.is_unstacked(nnx.state(self.blocks)):
            cache = [None] * config.num_layers
        x_BSD, cache = self.blocks(body, x_BSD, cache, remat=self.numerics.remat, unroll=step is not None)
        return self.norm(x_BSD), cache

    def open_cache(self, cache: Any, places: int) -> list[Any]:
        """The cache of a prompt, widened to ``places``: for each layer its own, so that it is updated in place."""
        return [open_cache(cache[0][i], cache[1][i], places) for i in range(self.config.num_layers)]

    def logits(self, x: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
        """Float32 scores over the vocabulary."""
        dtype = jnp.dtype(self.numerics.compute_dtype)
        kernel, vocabulary_first = self.output_kernel()
        kernel = kernel.T if vocabulary_first else kernel
        return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)

    def output_kernel(self) -> tuple[Float[Array, "V D"] | Float[Array, "D V"], bool]:
        """The matrix behind `logits`, as it is stored, and whether its vocabulary comes first."""
        return (self.embedding[...], True) if self.head is None else (self.head.kernel[...], False)

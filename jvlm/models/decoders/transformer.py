"""The decoder of Llama, Mistral, Qwen2, Qwen3, MiMo and their relatives: they differ by switches, not by code.

Axes: B rows, S tokens, T places of a cache, D width, H query heads, K key/value heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jvlm.errors import UserError
from jvlm.models import device_ops, layers, registry
from jvlm.models.batch import DecoderOutput, DecodeStep
from jvlm.models.decoders.cross_attention import GatedCrossAttention, Media, Reach
from jvlm.models.registry import DecoderConfig, register


@dataclasses.dataclass(frozen=True)
class TransformerConfig(DecoderConfig):
    """Fields as in Hugging Face's ``text_config``; the defaults are MiMo-7B's.

    Attributes:
      head_dim: size of a head; None is hidden_size / num_heads.
      qkv_bias: biases on q, k and v (Qwen2).
      qk_norm: an RMSNorm on each head of q and k, before the rotation (Qwen3).
      mrope_section: frequencies that turn with the temporal, height and width id; None turns all with the first, which
        is plain rotary embedding.
      rope_scaling: how the frequencies are changed for contexts longer than the pre-training's.
      sliding_window: a token sees tokens fewer than so many places behind it; None sees all.
      cross_attention_every: 0 has features among the tokens; n has a gated cross-attention layer before every n-th
        layer, the first included, through which text reads them (`jvlm.models.decoders.cross_attention`).
      cross_attention_reach: a token reads the last frame before it in its conversation (Flamingo, Idefics1), or all.
      mlp: what every ``mlp.every``-th layer has in place of the dense SwiGLU; None: SwiGLU everywhere.
    """

    vocab_size: int = 151680
    hidden_size: int = 4096
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int | None = None
    intermediate_size: int = 11008
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    rope_theta: float = 1e6
    rope_scaling: layers.RopeScaling | None = None
    mrope_section: tuple[int, int, int] | None = None
    sliding_window: int | None = None
    cross_attention_every: int = 0
    cross_attention_reach: Reach = "last"
    mlp: registry.MLPConfig | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 128000

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads or (self.head_dim is None and self.hidden_size % self.num_heads):
            raise UserError(
                f"hidden_size {self.hidden_size}, num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads} "
                "must divide one another"
            )
        if self.mrope_section is not None and 2 * sum(self.mrope_section) != self.head_size:
            raise UserError(f"mrope_section {self.mrope_section} must sum to half the head size {self.head_size}")
        if self.num_layers % self.period:
            raise UserError(f"num_layers {self.num_layers} must be a multiple of the layers' period {self.period}")

    @property
    def head_size(self) -> int:
        """Size of a head, given or derived."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def period(self) -> int:
        """After how many layers their kinds repeat. A scan runs over groups of so many layers."""
        return math.lcm(self.mlp.every if self.mlp else 1, self.cross_attention_every or 1)

    def has_cross_attention(self, index: int) -> bool:
        """Whether text reads features before layer ``index`` (from 0)."""
        return bool(self.cross_attention_every) and index % self.cross_attention_every == 0

    def has_mlp(self, index: int) -> bool:
        """Whether layer ``index`` (from 0) has ``mlp`` in place of the dense SwiGLU."""
        return self.mlp is not None and (index + 1) % self.mlp.every == 0


class Context(NamedTuple):
    """What all layers of one pass share."""

    angles: Float[Array, "B S f"]
    segments: Int[Array, "B S"]
    max_segment_length: int | None
    step: DecodeStep | None
    media: Media | None


class DecoderAttention(nnx.Module):
    """Causal grouped-query attention within the segment."""

    def __init__(self, config: TransformerConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        D, self.head_size = config.hidden_size, config.head_size
        self.heads, self.kv_heads, self.window = config.num_heads, config.num_kv_heads, config.sliding_window
        self.implementation = precision.attention
        common = {"precision": precision, "rngs": rngs}
        q_width, kv_width = self.heads * self.head_size, self.kv_heads * self.head_size
        self.q = layers.Linear(D, q_width, ("embed", "heads"), bias=config.qkv_bias, **common)
        self.k = layers.Linear(D, kv_width, ("embed", "kv_heads"), bias=config.qkv_bias, **common)
        self.v = layers.Linear(D, kv_width, ("embed", "kv_heads"), bias=config.qkv_bias, **common)
        self.out = layers.Linear(q_width, D, ("heads", "embed"), bias=False, **common)
        norm = {"eps": config.rms_norm_eps, "precision": precision}
        self.q_norm = layers.RMSNorm(self.head_size, **norm) if config.qk_norm else None
        self.k_norm = layers.RMSNorm(self.head_size, **norm) if config.qk_norm else None

    @jax.named_scope("attention")
    def __call__(self, x_BSD, context: Context, cache):
        B, S, _ = x_BSD.shape
        q = self.q(x_BSD)
        if context.step is not None:
            # else XLA for TPU turns the weight around, a copy in every step, to have its product by heads at once
            q = jax.lax.optimization_barrier(q)
        q = q.reshape(B, S, self.heads, self.head_size)
        k = self.k(x_BSD).reshape(B, S, self.kv_heads, self.head_size)
        v = self.v(x_BSD).reshape(B, S, self.kv_heads, self.head_size)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = layers.rotate(q, context.angles), layers.rotate(k, context.angles)
        if context.step is None:
            cache = tuple(device_ops.current().expand_kv_heads(x, self.heads) for x in (k, v))
            mixed = device_ops.current().attention(
                q,
                k,
                v,
                context.segments,
                context.segments,
                along="sequence",
                causal=True,
                window=self.window,
                max_segment_length=context.max_segment_length,
                implementation=self.implementation,
            )
        else:
            place = context.step.place
            mixed, cache = device_ops.current().cached_attention(q, k, v, cache, place, window=self.window)
        return self.out(mixed.reshape(B, S, -1)), cache


class DecoderBlock(nnx.Module):
    """Pre-norm block: causal attention, then an MLP. Features may be read before; their keys are cached beside."""

    def __init__(self, config: TransformerConfig, index: int, *, precision: layers.Precision, rngs: nnx.Rngs):
        D, common = config.hidden_size, {"precision": precision, "rngs": rngs}
        self.cross = GatedCrossAttention(config, **common) if config.has_cross_attention(index) else None
        self.norm1 = layers.RMSNorm(D, config.rms_norm_eps, precision=precision)
        self.attention = DecoderAttention(config, **common)
        self.norm2 = layers.RMSNorm(D, config.rms_norm_eps, precision=precision)
        self.reports = config.has_mlp(index)
        if self.reports:
            self.mlp = registry.build(config.mlp, width=D, **common)
        else:
            self.mlp = layers.SwiGLU(D, config.intermediate_size, bias=False, **common)

    def __call__(self, x_BSD, context: Context, cache):
        kept = None
        if self.cross is not None:
            cache, kept = cache or (None, None)
            x_BSD, kept = self.cross(x_BSD, context.media, kept)
        mixed, cache = self.attention(self.norm1(x_BSD), context, cache)
        cache = cache if self.cross is None else (cache, kept)
        x_BSD = x_BSD + mixed
        y_BSD, aux = self.norm2(x_BSD), {}
        if self.reports:
            with jax.named_scope("mlp"):
                y_BSD, aux = self.mlp(y_BSD, context.segments)
        else:
            y_BSD = self.mlp(y_BSD)
        return x_BSD + y_BSD, cache, aux


class BlockGroup(nnx.Module):
    """The layers of one period, where they differ: ``slots`` in order. Caches and reports are tuples of theirs."""

    def __init__(self, config: TransformerConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        make = (DecoderBlock(config, i, precision=precision, rngs=rngs) for i in range(config.period))
        self.slots = nnx.List(make)

    def __call__(self, x_BSD, context: Context, cache):
        caches, reports = [], []
        for slot, own in zip(self.slots, cache or [None] * len(self.slots), strict=True):
            x_BSD, own, aux = slot(x_BSD, context, own)
            caches.append(own)
            reports.append(aux)
        names = sorted({name for aux in reports for name in aux})
        aux = {name: jnp.stack([a[name] for a in reports if name in a]) for name in names}
        return x_BSD, tuple(caches), aux


@register(TransformerConfig)
class Transformer(nnx.Module):
    """Token embeddings to hidden states and logits."""

    def __init__(self, config: TransformerConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.config = config
        self.precision = precision
        V, D = config.vocab_size, config.hidden_size
        self.embedding = nnx.Param(precision.init_weight(rngs.params(), (V, D), D), axes=("vocab", "embed"))

        def make(r: nnx.Rngs) -> nnx.Module:
            if config.period == 1:
                return DecoderBlock(config, 0, precision=precision, rngs=r)
            return BlockGroup(config, precision=precision, rngs=r)

        self.blocks = layers.LayerStack(make, config.num_layers // config.period, rngs=rngs)
        self.norm = layers.RMSNorm(D, config.rms_norm_eps, precision=precision)
        self.head = (
            None
            if config.tie_word_embeddings
            else layers.Linear(D, V, ("embed", "vocab"), bias=False, precision=precision, rngs=rngs)
        )

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Embeddings of token ids, in the compute dtype."""
        return device_ops.current().embedding_lookup(self.embedding[...], tokens, self.precision.compute_dtype)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        positions: Int[Array, "B S 3"],
        segments: Int[Array, "B S"],
        *,
        media: Media | None = None,
        max_segment_length: int | None = None,
        cache: Any = None,
        step: DecodeStep | None = None,
    ) -> DecoderOutput:
        """Hidden states, the keys and values of every layer, and what layers report.

        Without ``step``: the cache returned holds this call's keys and values. With it: the new token of each row
        is written into ``cache``, as `open_cache` made it, and sees what the step allows; segments are not used.

        Args:
          media: what cross-attention layers read; None where the batch has no pictures.
        """
        context = Context(self._angles(positions), segments, max_segment_length, step, media)

        def body(block, x, layer_cache):
            x, layer_cache, aux = block(x, context, layer_cache)
            return x, (layer_cache, aux)

        if cache is None and layers.is_unstacked(nnx.state(self.blocks)):
            cache = [None] * self.blocks.depth
        unroll = step is not None
        x_BSD, ys = self.blocks(body, x_BSD, cache, remat=self.precision.remat, unroll=unroll)
        cache, aux = ([y[0] for y in ys], _stacked([y[1] for y in ys])) if isinstance(ys, list) else ys
        aux = {name: value.reshape(-1, *value.shape[1 + (self.config.period > 1) :]) for name, value in aux.items()}
        return DecoderOutput(self.norm(x_BSD), cache, aux)

    def _angles(self, positions: Int[Array, "B S 3"]) -> Float[Array, "B S f"]:
        config = self.config
        frequencies = layers.rotary_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
        axis_of = np.repeat([0, 1, 2], config.mrope_section or (len(frequencies), 0, 0))
        return layers.rotary_angles(positions, axis_of, frequencies)

    def open_cache(self, cache: Any, places: int) -> list[Any]:
        """The cache of a prompt, widened to ``places``: for each layer its own, so that it is updated in place."""

        def layer(slot: int, own: Any, index: int) -> Any:
            kept = None
            if self.config.has_cross_attention(slot):
                own, kept = own
            k, v = own[0][index], own[1][index]
            opened = device_ops.current().init_cache(k, v, places)
            # each layer has its own copy of all, because the cache is donated from step to step
            return (opened, jax.tree.map(lambda x: x[index], kept)) if self.config.has_cross_attention(slot) else opened

        if self.config.period == 1:
            return [layer(0, cache, i) for i in range(self.blocks.depth)]
        return [tuple(layer(s, own, i) for s, own in enumerate(cache)) for i in range(self.blocks.depth)]

    def logits(self, x: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
        """Float32 scores over the vocabulary."""
        dtype = jnp.dtype(self.precision.compute_dtype)
        kernel, vocabulary_first = self.output_kernel()
        kernel = kernel.T if vocabulary_first else kernel
        return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)

    def output_kernel(self) -> tuple[Float[Array, "V D"] | Float[Array, "D V"], bool]:
        """The matrix behind `logits`, as it is stored, and whether its vocabulary comes first."""
        return (self.embedding[...], True) if self.head is None else (self.head.kernel[...], False)


def _stacked(reports: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: jnp.stack([aux[name] for aux in reports]) for name in reports[0]}

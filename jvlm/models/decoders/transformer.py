"""The decoder of Llama, Mistral, Qwen2, Qwen3, MiMo and their relatives: they differ in options, not in code.

Axes: B sequences, S tokens, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from jvlm_kernels.platforms import target_platform

from jvlm.errors import UserError
from jvlm.models import device_ops, layers, registry
from jvlm.models.arithmetic import Counts, Product, Work, attention_flops, attention_products, swiglu_products
from jvlm.models.attention import Attention
from jvlm.models.batch import CacheSizes, DecoderOutput, DecodeStep, PackedBatch, PrefillStep
from jvlm.models.contracts import (
    DecoderConfig,
    DecoderInputs,
    MLPConfig,
    VisionTokens,
    deepstack_at_tokens,
    replace_placeholders,
)
from jvlm.models.device_ops import Layer
from jvlm.models.layer_stack import LayerStack
from jvlm.models.registry import register


@dataclasses.dataclass(frozen=True)
class TransformerConfig(DecoderConfig, tag="transformer"):
    """Fields as in Hugging Face's ``text_config``; the defaults are MiMo-7B's.

    Attributes:
      vocab_size: number of rows of the embedding.
      hidden_size: width of the hidden states.
      num_layers: number of layers.
      num_heads: query heads of a layer.
      num_kv_heads: key and value heads of a layer.
      intermediate_size: width inside the SwiGLU MLPs.
      rms_norm_eps: added to the mean square in each RMSNorm.
      rope_theta: base of the rotary frequencies.
      tie_word_embeddings: the output matrix is the embedding.
      max_position_embeddings: positions that generation may use.
      labels: scores that the model gives in the place of a next token, as transformers' ForSequenceClassification; 1 is
        a reward model, None a language model.
      head_dim: size of a head; None is hidden_size / num_heads.
      qkv_bias: biases on q, k and v (Qwen2).
      qk_norm: an RMSNorm on each head of q and k, before the rotation (Qwen3).
      mrope_section: number of frequencies that turn with the temporal, height and width id (M-RoPE); None turns all
        with the first, which is plain rotary embedding.
      mrope_interleaved: the frequencies of height and width are every third one from the second and third on, and the
        others the temporal id's (Qwen3-VL); otherwise each id has those of a section.
      rope_scaling: how the frequencies are changed for contexts longer than the pre-training's.
      sliding_window: a token attends to itself and the ``sliding_window - 1`` tokens before it; None has no limit.
      mlp: what every ``mlp.every``-th layer has in place of the dense SwiGLU; None has SwiGLU everywhere.
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
    mrope_interleaved: bool = False
    sliding_window: int | None = None
    mlp: MLPConfig | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 128000
    labels: int | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads or (self.head_dim is None and self.hidden_size % self.num_heads):
            raise UserError(
                f"hidden_size {self.hidden_size}, num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads} "
                "must divide one another"
            )
        if self.mrope_section is not None and 2 * sum(self.mrope_section) != self.head_size:
            raise UserError(f"mrope_section {self.mrope_section} must sum to half the head size {self.head_size}")
        if self.mrope_interleaved and (
            self.mrope_section is None or 3 * max(self.mrope_section[1:]) > self.head_size // 2
        ):
            raise UserError(
                f"mrope_interleaved needs mrope_section of at most {self.head_size // 6} for height and for width, got "
                f"{self.mrope_section}"
            )
        if self.num_layers % self.pattern_length:
            raise UserError(
                f"num_layers {self.num_layers} must be a multiple of the length {self.pattern_length} of the layer "
                "pattern"
            )

    @property
    def head_size(self) -> int:
        """Size of an attention head, given or derived."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def pattern_length(self) -> int:
        """Length of the layer pattern, which repeats: a scan runs over its repeats."""
        return self.mlp.every if self.mlp else 1

    @property
    def uses_mrope(self) -> bool:
        """Whether positions differ between the axes (t, h, w)."""
        return self.mrope_section is not None

    @property
    def prefills_whole(self) -> bool:
        return self.sliding_window is not None or super().prefills_whole

    @property
    def attention_width(self) -> int:
        """Number of query heads times the size of a head."""
        return self.num_heads * self.head_size

    def work(self, counts: Counts, tokens_per_image: int | None) -> Work:
        """Return the arithmetic of a forward pass: a token attends to those before it, within its window."""
        lengths = counts.segments.astype(np.float64)
        reach = np.minimum(lengths, self.sliding_window or np.inf)
        pairs = self.num_layers * float((lengths * reach - reach**2 / 2).sum())
        return Work(self._products(counts.tokens), attention_flops(pairs, self.attention_width))

    def decode_work(self, sequences: int, cache_len: int, tokens_per_image: int | None) -> Work:
        """Return the arithmetic of one new token for each sequence."""
        pairs = float(sequences) * self.num_layers * min(cache_len, self.sliding_window or cache_len)
        return Work(self._products(sequences), attention_flops(pairs, self.attention_width))

    def _products(self, tokens: float | int) -> tuple[Product, ...]:
        D, others = self.hidden_size, sum(self.has_mlp(i) for i in range(self.num_layers))
        kv_width = self.num_kv_heads * self.head_size
        return (
            *attention_products(tokens * self.num_layers, D, self.attention_width, kv_width),
            *swiglu_products(tokens * (self.num_layers - others), D, self.intermediate_size),
            *(self.mlp.products(tokens * others, D) if self.mlp else ()),
        )

    def has_mlp(self, index: int) -> bool:
        """Return whether layer ``index`` (from 0) has ``mlp`` in place of the dense SwiGLU."""
        return self.mlp is not None and (index + 1) % self.mlp.every == 0


class Context(NamedTuple):
    """What all layers share in one pass.

    Attributes:
      rotary: of each token.
      step: of prefill or decoding, with a cache; None in a whole pass.
      memory: `DecoderInputs.memory`.
    """

    rotary: layers.RotaryEmbedding
    segments: Int[Array, "B S"]
    max_segment_length: int | None
    step: PrefillStep | DecodeStep | None
    memory: Any


@runtime_checkable
class DecoderLayer(Protocol):
    """A layer, or the layers of one repeat of the layer pattern."""

    def __call__(
        self, x_BSD: Array, context: Context, cache: Any = None, number: Layer | None = None
    ) -> tuple[Array, Any, dict[str, Array]]:
        """Return hidden states, the cache of all layers with the new tokens of this one, and reports by name.

        Args:
          cache: of all layers; None in a whole pass.
          number: of the layer, or of the repeat; a whole pass needs none.
        """

    def init_cache(self, depth: int, sizes: CacheSizes, dtype: DTypeLike) -> Any:
        """Return an empty cache of ``depth`` layers such as this, or repeats. Arrays begin with an axis of them."""


class DecoderBlock(nnx.Module):
    """Pre-norm layer: causal attention within the conversation, then an MLP."""

    def __init__(self, config: TransformerConfig, index: int, *, precision: layers.Precision, rngs: nnx.Rngs):
        D, common = config.hidden_size, {"precision": precision, "rngs": rngs}
        self.window = config.sliding_window
        self.norm1 = layers.RMSNorm(D, config.rms_norm_eps, precision=precision)
        self.attention = Attention(
            D,
            config.num_heads,
            head_dim=config.head_size,
            num_kv_heads=config.num_kv_heads,
            qkv_bias=config.qkv_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
            **common,
        )
        self.norm2 = layers.RMSNorm(D, config.rms_norm_eps, precision=precision)
        self.has_reports = config.has_mlp(index)
        if self.has_reports:
            self.mlp = registry.build(config.mlp, width=D, **common)
        else:
            self.mlp = layers.SwiGLU(D, config.intermediate_size, bias=False, **common)

    def __call__(self, x_BSD, context: Context, cache=None, number=None):
        normed, step = self.norm1(x_BSD), context.step
        if step is None:
            mask = {"causal": True, "window": self.window, "max_segment_length": context.max_segment_length}
            mixed = self.attention(normed, context.segments, rotary=context.rotary, **mask)
        elif isinstance(step, PrefillStep):
            mixed, cache = self.attention.prefill(
                normed, context.segments, cache, number, step, context.rotary, window=self.window
            )
        else:
            mixed, cache = self.attention.decode(normed, cache, number, step, context.rotary, window=self.window)
        x_BSD = x_BSD + mixed
        y_BSD, reports = self.norm2(x_BSD), {}
        if self.has_reports:
            with jax.named_scope("mlp"):
                y_BSD, reports = self.mlp(y_BSD, context.segments)
        else:
            y_BSD = self.mlp(y_BSD)
        return x_BSD + y_BSD, cache, reports

    def init_cache(self, depth: int, sizes: CacheSizes, dtype: DTypeLike):
        return self.attention.init_cache(depth, sizes, dtype)


class LayerGroup(nnx.Module):
    """One repeat of the layer pattern, (dense, experts) say. Its cache is the tuple of its layers' caches."""

    def __init__(self, pattern: Iterable[DecoderLayer]):
        self.pattern = nnx.List(pattern)

    def __call__(self, x_BSD, context: Context, cache=None, number=None):
        caches, reports = [], []
        for layer, layer_cache in zip(self.pattern, cache or [None] * len(self.pattern), strict=True):
            x_BSD, layer_cache, report = layer(x_BSD, context, layer_cache, number)
            caches.append(layer_cache)
            reports.append(report)
        names = sorted({name for report in reports for name in report})
        return x_BSD, tuple(caches), {n: jnp.stack([r[n] for r in reports if n in r]) for n in names}

    def init_cache(self, depth: int, sizes: CacheSizes, dtype: DTypeLike):
        return tuple(layer.init_cache(depth, sizes, dtype) for layer in self.pattern)


@register(TransformerConfig)
class Transformer(nnx.Module):
    """Token embeddings to hidden states and logits.

    Attributes:
      adapter: a `jvlm.adapters.layers.LowRankAdapter` beside the embedding table, or None.
      score: the matrix of ``labels``, in the place of a head; or None.
      token_rows, head_rows: `jvlm.adapters.layers.TokenRows` in the place of rows of the embedding table (and, where it
        is tied, of the output matrix), and of columns of the head; or None.
    """

    def __init__(self, config: TransformerConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.config = config
        self.precision = precision
        V, D = config.vocab_size, config.hidden_size
        self.embedding = nnx.Param(precision.init_weight(rngs.params(), (V, D), D), axes=("vocab", "embed"))

        def make(r: nnx.Rngs) -> nnx.Module:
            pattern = [self.make_layer(config, i, precision=precision, rngs=r) for i in range(config.pattern_length)]
            return LayerGroup(pattern) if len(pattern) > 1 else pattern[0]

        self.blocks = LayerStack(make, config.num_layers // config.pattern_length, rngs=rngs)
        self.norm = layers.RMSNorm(D, config.rms_norm_eps, precision=precision)
        self.head = (
            None
            if config.tie_word_embeddings or config.labels
            else layers.Linear(D, V, ("embed", "vocab"), bias=False, precision=precision, rngs=rngs)
        )
        self.score = (
            layers.Linear(D, config.labels, ("embed", "norm"), bias=False, precision=precision, rngs=rngs)
            if config.labels
            else None
        )
        self.adapter = self.token_rows = self.head_rows = None

    @staticmethod
    def make_layer(
        config: TransformerConfig, index: int, *, precision: layers.Precision, rngs: nnx.Rngs
    ) -> DecoderLayer:
        """Return the layer at an index of the layer pattern."""
        return DecoderBlock(config, index, precision=precision, rngs=rngs)

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Return the embeddings of token ids, in the compute dtype."""
        dtype = self.precision.compute_dtype
        x_BSD = device_ops.current().embedding_lookup(self.embedding[...], tokens, dtype)
        if self.adapter is not None:
            x_BSD = self.adapter.looked_up(tokens, x_BSD, lambda: self.embedding[...])
        return x_BSD if self.token_rows is None else self.token_rows.replace(tokens, x_BSD)

    def fuse(self, embeddings: Float[Array, "B S D"], vision: VisionTokens | None, batch: PackedBatch) -> DecoderInputs:
        """Put vision tokens in the place of their placeholders."""
        if self.config.pattern_length > 1 or len(vision.deepstack if vision else ()) > self.config.num_layers:
            refuse_deepstack(self, vision)
        deepstack = deepstack_at_tokens(vision, batch, embeddings.dtype)
        return DecoderInputs.of(replace_placeholders(embeddings, vision, batch), batch, deepstack=deepstack)

    def __call__(
        self,
        inputs: DecoderInputs,
        *,
        cache: Any = None,
        step: PrefillStep | DecodeStep | None = None,
    ) -> DecoderOutput:
        """Return hidden states, the cache with the new tokens, and what layers report.

        Without ``step`` there is no cache. With it, the tokens are written into ``cache``, as `init_cache` made it.
        """
        context = self.context(inputs, step)

        def body(layer: DecoderLayer, carry, number):
            x, rest, cache = carry
            x, cache, reports = layer(x, context, cache, number)
            return (*deepstack_added(x, rest, number), None if step is None else cache), reports

        numbers = np.arange(self.blocks.depth, dtype=np.int32)
        carry = inputs.embeddings, with_zeros(inputs.deepstack), cache
        (x_BSD, _, cache), outputs = self.blocks(
            body,
            carry,
            numbers,
            remat=self.precision.remat if step is None else "none",
            unroll=step is not None and not scans(step),
        )
        reports = outputs.stacked()
        if self.config.pattern_length > 1:  # those of a group have an axis for the layers of the pattern that report
            reports = {name: value.reshape(-1, *value.shape[2:]) for name, value in reports.items()}
        hidden = self.norm(x_BSD)
        if self.head is not None and self.head.adapter is not None:
            hidden = self.head.adapter.extended_input(hidden)  # what `output_kernel` is then multiplied with
        return DecoderOutput(hidden, cache, reports)

    def context(self, inputs: DecoderInputs, step: PrefillStep | DecodeStep | None = None) -> Context:
        """Return what all layers share in a pass."""
        rotary = self._rotary(inputs.positions)
        return Context(rotary, inputs.segment_ids, inputs.max_segment_length, step, inputs.memory)

    def _rotary(self, positions: Int[Array, "B S 3"]) -> layers.RotaryEmbedding:
        config = self.config
        frequencies = layers.rotary_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
        section = config.mrope_section or (len(frequencies), 0, 0)
        axis_of = np.repeat([0, 1, 2], section)
        if config.mrope_interleaved:
            axis_of = np.zeros(len(frequencies), int)
            for axis in (1, 2):
                axis_of[axis : 3 * section[axis] : 3] = axis
        return layers.rotary_embedding(positions, axis_of, frequencies)

    def init_cache(self, sizes: CacheSizes) -> Any:
        """Return an empty cache: pages of all layers in one array, so that a scan over layers updates it in place."""
        dtype = sizes.dtype or self.precision.compute_dtype
        return self.blocks.layer.init_cache(self.blocks.depth, sizes, dtype)

    def logits(self, x: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
        """Return float32 scores over the vocabulary."""
        dtype = jnp.dtype(self.precision.compute_dtype)
        kernel, vocabulary_first = self.output_kernel()
        kernel = kernel.T if vocabulary_first else kernel
        return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)

    def scores(self, x: Float[Array, "*L D"]) -> Float[Array, "*L n"]:
        """Return the float32 scores of a model with ``labels``."""
        kernel = self.score.weight(jnp.float32)
        return jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)

    def output_kernel(self) -> tuple[Float[Array, "V D"] | Float[Array, "D V"], bool]:
        """Return the matrix behind `logits` as it is stored, and whether the vocabulary is its first axis."""
        if self.score is not None:
            raise UserError("a reward model gives scores and no next token: it cannot write, nor be trained to")
        if self.head is None:
            table = self.embedding[...]
            return table if self.token_rows is None else self.token_rows.in_table(table, 0), True
        kernel = self.head.kernel[...]
        if self.head_rows is not None:
            kernel = self.head_rows.in_table(kernel, 1)
        return kernel if self.head.adapter is None else self.head.adapter.extended_kernel(kernel), False


def scans(step: PrefillStep | DecodeStep) -> bool:
    """Return whether a step with a cache scans over the layers of a stack, which is compiled once and not for each.

    A TPU reads the weights of long chunks out of the stack within the products. A GPU would copy them first, and to
    prefetch weights across layers, as decoding wants it, XLA must see all of them.
    """
    return isinstance(step, PrefillStep) and target_platform() == "tpu"


def with_zeros(deepstack_nBSD: Float[Array, "n B S d"] | None) -> Float[Array, "m B S d"] | None:
    """Return what `deepstack_added` takes: zeros are added after all layers behind the first n."""
    if deepstack_nBSD is None:
        return None
    stack = jnp.concatenate([deepstack_nBSD, jnp.zeros_like(deepstack_nBSD[:1])])
    return device_ops.current().constrain(stack, (None, "batch", "sequence", None))


def deepstack_added(
    x_BSD: Float[Array, "B S d"], stack_mBSD: Float[Array, "m B S d"] | None, number: Any
) -> tuple[Float[Array, "B S d"], Float[Array, "m B S d"] | None]:
    """Return the hidden states after layer ``number`` with what is added to them, and the stack.

    The stack goes through all layers of a scan: so its gradient is written one layer at a time, into one array.
    """
    if stack_mBSD is None:
        return x_BSD, None
    last = len(stack_mBSD) - 1
    if isinstance(number, np.integer):  # layers are unrolled
        return (x_BSD + stack_mBSD[number] if number < last else x_BSD), stack_mBSD
    added, stack_mBSD = _entry(stack_mBSD, jnp.minimum(number, last))
    return x_BSD + added, stack_mBSD


@jax.custom_vjp
def _entry(stack: Array, number: Array) -> tuple[Array, Array]:
    """Return an entry of a stack, each but the last being asked for once, and the stack."""
    return jax.lax.dynamic_index_in_dim(stack, number, 0, keepdims=False), stack


def _entry_forward(stack, number):
    return _entry(stack, number), number


def _entry_backward(number, gradients):
    d_entry, d_stack = gradients
    return jax.lax.dynamic_update_index_in_dim(d_stack, d_entry, number, 0), None


_entry.defvjp(_entry_forward, _entry_backward)


def refuse_deepstack(decoder: nnx.Module, vision: VisionTokens | None) -> None:
    """Raise ValueError where vision tokens have vectors for later layers, which this decoder would lose."""
    if vision is not None and vision.deepstack:
        raise ValueError(
            f"{type(decoder).__name__} adds no vision tokens after its first layers, and this connector returns "
            f"{len(vision.deepstack)} sets of them (VisionTokens.deepstack); it needs a decoder that does"
        )

"""The arithmetic that a step of training needs, and its share of what the devices could do (MFU). See docs/mfu.md.

A multiplication and its addition are two. Only what the result needs is counted: real patches and tokens, each query
with the keys of its own segment (half of them where attention is causal), the head at the tokens that are learnt,
backward passes only where something is learnt. Recomputation is not counted, nor are norms, activations and the update.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

import numpy as np
from flax import nnx

from jvlm.models.batch import PackedBatch
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.connectors.perceiver import PerceiverConfig
from jvlm.models.connectors.pooled_mlp import ImageGridConfig
from jvlm.models.contracts import ConnectorConfig, EncoderConfig
from jvlm.models.decoders.cross_attention import CrossAttentionTransformerConfig
from jvlm.models.encoders.qwen_vit import QwenViTConfig
from jvlm.models.encoders.vit import ViTConfig
from jvlm.models.vlm import TOWERS, VLM

PARTS = (*TOWERS, "head")

# Dense bfloat16 FLOP/s of one JAX device, by part of ``device_kind`` in lower case; vendors' data sheets. A v4 or v5p
# chip is one device; of a TPU7x chip (2307e12) each of its two cores is one. GPUs: SXM, without sparsity.
_PEAKS = {
    "tpu v4": 275e12,
    "tpu v5p": 459e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v6 lite": 918e12,
    "tpu v6e": 918e12,
    "tpu7x": 2307e12 / 2,
    "tpu v7": 2307e12 / 2,
    "h200": 989e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "a100": 312e12,
}


def peak(device_kind: str) -> float | None:
    """FLOP/s that a device could do in bfloat16; None where it is not known."""
    kind = device_kind.lower()
    return next((value for name, value in _PEAKS.items() if name in kind), None)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What of a batch costs arithmetic.

    Attributes:
      segments: tokens of each conversation.
      frames, windows: patches of each frame and of each attention window.
      features: vision features that feed tokens.
      targets: tokens whose successor is learnt.
    """

    segments: np.ndarray
    frames: np.ndarray
    windows: np.ndarray
    features: int
    targets: int

    @property
    def tokens(self) -> int:
        return int(self.segments.sum())

    @property
    def patches(self) -> int:
        return int(self.frames.sum())

    @classmethod
    def of(cls, batches: Iterable[PackedBatch]) -> Counts:
        """Of one or more batches of host arrays."""
        found = [_count(batch) for batch in batches]
        none = np.zeros(0, np.int64)
        lengths = [np.concatenate([none, *(getattr(c, n) for c in found)]) for n in ("segments", "frames", "windows")]
        return cls(*lengths, sum(c.features for c in found), sum(c.targets for c in found))


def _count(batch: PackedBatch) -> Counts:
    segments, weights = np.asarray(batch.segment_ids), np.asarray(batch.loss_weights)
    learnt = (weights[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
    return Counts(
        _lengths(segments),
        _lengths(batch.patch_segment_ids),
        _lengths(batch.patch_window_ids),
        int((np.asarray(batch.vision_index) >= 0).sum()),
        int(learnt.sum()),
    )


def _lengths(ids_BN) -> np.ndarray:
    found = [np.bincount(row)[1:] for row in np.asarray(ids_BN) if row.size]
    lengths = np.concatenate([np.zeros(0, np.int64), *found])
    return lengths[lengths > 0]


@dataclasses.dataclass(frozen=True)
class Product:
    """A weight of ``d_in`` x ``d_out`` that ``uses`` vectors meet.

    Attributes:
      entry: it reads what comes into its part.
      grouped: it is an expert's.
    """

    uses: float
    d_in: int
    d_out: int
    entry: bool = False
    grouped: bool = False

    @property
    def flops(self) -> float:
        return 2.0 * self.uses * self.d_in * self.d_out


@dataclasses.dataclass(frozen=True)
class Work:
    """The forward arithmetic of a part: products with weights, and FLOP of attention's two products."""

    products: tuple[Product, ...]
    attention: float = 0.0

    @property
    def linear(self) -> float:
        return sum(product.flops for product in self.products)

    @property
    def total(self) -> float:
        return self.linear + self.attention


@dataclasses.dataclass(frozen=True)
class Parts:
    """FLOP of each part of the model."""

    encoder: float
    connector: float
    decoder: float
    head: float

    @property
    def total(self) -> float:
        return self.encoder + self.connector + self.decoder + self.head


def forward(template: VLM, counts: Counts) -> dict[str, Work]:
    """What each part computes, once, forwards.

    Args:
      template: the model; shapes are enough.

    Raises:
      TypeError: an encoder or connector that nobody has taught this module to count.
    """
    config = template.config
    encoder = _products(template.encoder, counts.patches, entry="patch_embed")
    decoder = _products(template.decoder, counts.tokens, _features_read(template, counts))
    return {
        "encoder": Work(encoder, _encoder_attention(config.encoder, template.encoder, counts)),
        "connector": _connector(config.connector, template.connector, counts),
        "decoder": Work(decoder, _decoder_attention(template, counts)),
        "head": Work((Product(counts.targets, config.decoder.hidden_size, config.decoder.vocab_size),)),
    }


def training(
    template: VLM, counts: Counts, learnt: Mapping[str, bool], adapter_rank: Mapping[str, int] | None = None
) -> Parts:
    """One forward and backward pass.

    Args:
      learnt: for each tower, whether its weights are. A gradient goes back through a frozen tower only if something
        before it is learnt, and never to its weights.
      adapter_rank: of low-rank adapters on all weights of a tower; they are learnt, and their own products count.
    """
    ranks, work = adapter_rank or {}, forward(template, counts)
    moves = {tower: learnt[tower] or ranks.get(tower, 0) > 0 for tower in TOWERS}
    before = {
        "encoder": False,
        "connector": moves["encoder"],
        "decoder": moves["encoder"] or moves["connector"] or learnt["decoder"],  # its embedding is learnt with it
        "head": any(moves.values()),
    }
    found = {}
    for part in PARTS:
        tower = "decoder" if part == "head" else part
        rank = 0 if part == "head" else ranks.get(tower, 0)
        found[part] = _both_ways(work[part], before[part], learnt[tower], rank)
    return Parts(**found)


def inference(template: VLM, counts: Counts) -> Parts:
    """One forward pass with the head at ``counts.targets`` tokens."""
    return Parts(**{part: work.total for part, work in forward(template, counts).items()})


def decoding(template: VLM, rows: int, past: int) -> tuple[Parts, float]:
    """One step of generation for so many rows, each token meeting ``past`` places; and how much of it is attention.

    Pictures were read with the prompt: only cross-attention still meets the features of one frame.
    """
    config = template.config.decoder
    reach = min(past, getattr(config, "sliding_window", None) or past)
    pairs = float(rows) * config.num_layers * reach
    if isinstance(config, CrossAttentionTransformerConfig):
        pairs += rows * (config.num_layers // config.cross_attention_every) * _tokens_per_image(template)
    attention = 4 * pairs * _width(template.decoder)
    linear = sum(product.flops for product in _products(template.decoder, rows))
    head = Product(rows, config.hidden_size, config.vocab_size)
    return Parts(0.0, 0.0, linear + attention, head.flops), attention


def experts(template: VLM, tokens: int) -> float:
    """What the decoder's experts compute of the forward arithmetic of so many tokens."""
    return sum(product.flops for product in _products(template.decoder, tokens) if product.grouped)


def _both_ways(work: Work, gradient_wanted: bool, learnt: bool, rank: int) -> float:
    """Forward and backward FLOP of a part; ``gradient_wanted`` says that what comes into it needs a gradient."""
    flops = work.total
    if rank:
        flops += sum(2.0 * p.uses * rank * (p.d_in + p.d_out) for p in work.products)
    if not (gradient_wanted or learnt or rank):
        return flops
    flops += 2 * work.attention
    for product in work.products:
        inputs = gradient_wanted or not product.entry
        adapter = 2.0 * product.uses * rank
        flops += inputs * product.flops + learnt * product.flops
        flops += adapter * (product.d_in + product.d_out) + adapter * (product.d_out + inputs * product.d_in)
    return flops


def _products(
    part: nnx.Module, uses: float, features_read: float = 0.0, *, entry: str | None = None
) -> tuple[Product, ...]:
    """Every matrix of a part that each of ``uses`` vectors meets; stacked layers count each.

    Keys and values of cross-attention are made of ``features_read`` features instead.
    """
    found = []
    for path, variable in nnx.to_flat_state(nnx.state(part, nnx.Param)):
        axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
        if len(axes) < 2 or "vocab" in axes or "position" in axes:
            continue  # norms and biases; tables that are looked up; the head, which is counted apart
        grouped = axes[0] == "experts"
        if grouped:  # each vector meets as many as it chooses
            stacked = math.prod(shape[:-3]) * part.config.mlp.top_k
        elif len(axes) == 2:
            stacked = math.prod(shape[:-2])
        else:
            raise TypeError(f"{'.'.join(map(str, path))}: no rule says how many vectors meet a weight of axes {axes}")
        met = features_read if "cross" in path and path[-2] in ("k", "v") else uses
        found.append(Product(met * stacked, *shape[-2:], path[0] == entry, grouped))
    return tuple(found)


def _width(part: nnx.Module) -> int:
    """Heads times head size, read off the projection after attention."""
    paths = nnx.to_flat_state(nnx.state(part.blocks, nnx.Param))
    return next(v.get_value().shape[-2] for path, v in paths if path[-3:] == ("attention", "out", "kernel"))


def _squares(lengths: np.ndarray) -> float:
    return float(np.square(lengths.astype(np.float64)).sum())


@functools.singledispatch
def _encoder_attention(config: EncoderConfig, encoder: nnx.Module, counts: Counts) -> float:
    raise TypeError(f"the arithmetic of {type(config).__name__} is not known to jvlm.training.flops; add it there")


@_encoder_attention.register
def _(config: QwenViTConfig, encoder, counts):
    full = len(set(config.fullatt_block_indexes))
    pairs = full * _squares(counts.frames) + (config.depth - full) * _squares(counts.windows)
    return 4 * pairs * _width(encoder)


@_encoder_attention.register
def _(config: ViTConfig, encoder, counts):
    return 4 * config.depth * _squares(counts.frames) * _width(encoder)


@functools.singledispatch
def _connector(config: ConnectorConfig, connector: nnx.Module, counts: Counts) -> Work:
    raise TypeError(f"the arithmetic of {type(config).__name__} is not known to jvlm.training.flops; add it there")


@_connector.register
def _(config: PatchMergerConfig, connector, counts):
    return Work(_products(connector, counts.features))  # no entry: the norm before it is learnt too


@_connector.register
def _(config: PerceiverConfig, connector, counts):
    """Keys and values are made of patches and latents; each latent meets its frame's patches and latents."""
    latents = config.latents * len(counts.frames)
    attention, mlp = connector.blocks.layer.attention, connector.blocks.layer.mlp
    made = [(connector.projection, counts.patches), (attention.q, latents), (attention.out, latents), (mlp, latents)]
    made += [(part, counts.patches + latents) for part in (attention.k, attention.v)]
    products = tuple(product for part, uses in made for product in _products(part, uses))
    pairs = config.depth * config.latents * float((counts.frames + config.latents).sum())
    return Work(products, 4 * pairs * config.num_heads * config.head_dim)


@_connector.register
def _(config: ImageGridConfig, connector, counts):
    """Without the pooling and the depthwise convolutions, which are little beside the rest."""
    frames, products = len(counts.frames), []
    for path, variable in nnx.to_flat_state(nnx.state(connector, nnx.Param)):
        axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
        if len(axes) == 2 and "position" not in axes:
            once = path[-2] in ("squeeze", "excite")  # of a frame's mean
            uses = frames if once else frames * config.grid**2 if path[0] == "stage1" else counts.features
            products.append(Product(uses, *shape))
    return Work(tuple(products))


def _decoder_attention(template: VLM, counts: Counts) -> float:
    """Causal: each query meets half of its segment, or of its window where that is shorter."""
    config, lengths = template.config.decoder, counts.segments.astype(np.float64)
    reach = np.minimum(lengths, getattr(config, "sliding_window", None) or np.inf)
    pairs = config.num_layers * float((lengths * reach - reach**2 / 2).sum())
    if isinstance(config, CrossAttentionTransformerConfig) and len(counts.frames):
        # each token counted as reading one frame, as most do: text before the first picture reads none
        layers = config.num_layers // config.cross_attention_every
        pairs += layers * counts.tokens * _tokens_per_image(template)
    return 4 * pairs * _width(template.decoder)


def _features_read(template: VLM, counts: Counts) -> float:
    """Features that cross-attention makes keys and values of."""
    if not isinstance(template.config.decoder, CrossAttentionTransformerConfig):
        return 0.0
    return float(_tokens_per_image(template) * len(counts.frames))


def _tokens_per_image(template: VLM) -> int:
    tokens = template.config.connector.tokens_per_image
    if tokens is None:
        kind = type(template.config.connector).__name__
        raise TypeError(
            f"the arithmetic of cross-attention to {kind}, whose images have any number of tokens, is not known"
        )
    return tokens


def of_batch(template: VLM, batches: Iterable[PackedBatch], learnt: Mapping[str, bool]) -> Parts:
    """`training` of one or more batches of host arrays."""
    return training(template, Counts.of(batches), learnt)

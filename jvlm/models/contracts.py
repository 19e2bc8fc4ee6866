"""What encoders, connectors and decoders take, return and declare, so that the assembly needs to know none of them.

A part is a configuration (a frozen dataclass derived from `EncoderConfig`, `ConnectorConfig`, `DecoderConfig` or
`MLPConfig`) and the module that it builds; `jvlm.models.registry.register` joins the two and refuses a part that lacks
a member named here, with what that member is for.

Axes: B sequences, S tokens, P patches, F vision tokens, D width of the decoder, V vocabulary, T positions of a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jvlm.errors import UserError
from jvlm.models import device_ops
from jvlm.models.arithmetic import Counts, Product, Work
from jvlm.models.batch import CacheSizes, DecoderOutput, DecodeStep, PackedBatch, PrefillStep
from jvlm.tags import Tagged


class VisionTokens(NamedTuple):
    """What an encoder returns, one token for each patch, and what a connector makes of it for the decoder.

    `PackedBatch.vision_index` counts the tokens of a connector.

    Attributes:
      tokens: the vectors.
      image_ids: number of the image in its sequence, from 1, that each token belongs to; 0 where there is no image.
        Tiles and video frames count as images.
      deepstack: further vectors for the same tokens, which a decoder adds to its hidden states after its first layers
        (DeepStack, arXiv 2406.04334; Qwen3-VL).
    """

    tokens: Float[Array, "B F D"]
    image_ids: Int[Array, "B F"]
    deepstack: tuple[Float[Array, "B F D"], ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderInputs:
    """What the layers of a decoder run over.

    Attributes:
      embeddings: hidden states before the first layer.
      positions: rotary ids (t, h, w) of each token.
      segment_ids: number of the conversation in its sequence, from 1; 0 is padding.
      memory: what else the layers of this decoder read, vision tokens for cross-attention say; its own business.
      deepstack: for each of the first layers, what is added to the hidden states after it: the vectors of
        `VisionTokens.deepstack` at the tokens that they feed, 0 at all others; None adds nothing. A part of a prompt
        needs the part of these that goes with its tokens; a step of decoding, whose tokens are text, needs none.
      max_segment_length: no conversation is longer (static); None where that is not known.
    """

    embeddings: Any
    positions: Any
    segment_ids: Any
    memory: Any = None
    max_segment_length: int | None = dataclasses.field(default=None, metadata={"static": True})
    deepstack: Any = None

    @classmethod
    def of(
        cls, embeddings: Float[Array, "B S D"], batch: PackedBatch, memory: Any = None, deepstack: Any = None
    ) -> DecoderInputs:
        """Return the inputs of a whole pass over a batch."""
        positions, segment_ids = jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids)
        return cls(embeddings, positions, segment_ids, memory, batch.max_segment_length, deepstack)


@runtime_checkable
class Encoder(Protocol):
    """Module of an `EncoderConfig`, built with ``precision=`` and ``rngs=``."""

    def __call__(self, batch: PackedBatch) -> VisionTokens:
        """Return a token for each patch of the batch, in the order of the patches."""


@runtime_checkable
class Connector(Protocol):
    """Module of a `ConnectorConfig`, built with ``d_in=``, ``d_out=``, ``precision=`` and ``rngs=``.

    Also with ``placeholders_per_image=``: how many tokens of text stand for an image, None where that follows from its
    patches. Bounds how many images a sequence can hold.
    """

    def __call__(self, vision: VisionTokens, batch: PackedBatch) -> VisionTokens:
        """Return tokens of the decoder's width."""


@runtime_checkable
class Decoder(Protocol):
    """Module of a `DecoderConfig`, built with ``precision=`` and ``rngs=``."""

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Return the embeddings of token ids, in the compute dtype."""

    def fuse(self, embeddings: Float[Array, "B S D"], vision: VisionTokens | None, batch: PackedBatch) -> DecoderInputs:
        """Bring text and vision together: in the embeddings (`replace_placeholders`), in the memory, or both.

        ``vision`` is None where the batch has no patches. Must not drop ``vision.deepstack`` silently.
        """

    def __call__(
        self, inputs: DecoderInputs, *, cache: Any = None, step: PrefillStep | DecodeStep | None = None
    ) -> DecoderOutput:
        """Return hidden states and a cache.

        Without ``step``, a whole pass without a cache. With a `PrefillStep`, inputs are chunks of prompts, packed; with
        a `DecodeStep`, new tokens of each sequence. They are written into ``cache`` and attend to what it holds of
        their sequences. A decoder that cannot generate takes neither.
        """

    def logits(self, hidden: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
        """Return float32 scores over the vocabulary."""

    def output_kernel(self) -> tuple[Float[Array, "V D"] | Float[Array, "D V"], bool]:
        """Return the matrix behind `logits` as it is stored, and whether the vocabulary is its first axis."""


@runtime_checkable
class Generates(Protocol):
    """A `Decoder` that generates with a cache."""

    def init_cache(self, sizes: CacheSizes) -> Any:
        """Return an empty cache. Its arrays have layers as their first axis, and pages or slots as their second."""


_WIDTH = "width of the hidden states that it returns"


@dataclasses.dataclass(frozen=True)
class EncoderConfig(Tagged):
    """Base of encoder configurations. A configuration declares:

    hidden_size: width of the tokens that the encoder returns.
    patch_values: numbers in one flattened patch of `PackedBatch.patches`.
    """

    required: ClassVar[Mapping[str, str]] = {"hidden_size": _WIDTH, "patch_values": "numbers in a flattened patch"}
    module_required: ClassVar[Mapping[str, str]] = {"__call__": "(batch) -> VisionTokens, one for each patch"}

    def work(self, counts: Counts) -> Work:
        """Return the arithmetic of a forward pass. Raises TypeError where it is not declared."""
        raise _undeclared(self)

    @property
    def position_values(self) -> int:
        """Numbers that say where a patch is, in `PackedBatch.patch_positions`: (h, w), and more where it is read."""
        return 2

    @property
    def window_patches(self) -> int | None:
        """Patches of a whole attention window; None where all layers attend to the whole image."""
        return None

    def branch_frequency(self) -> Mapping[str, float]:
        """Return how often the branches of conditionals inside loops run.

        Keys are what the names of a branch's operations contain, as "attention/cond/branch_1_fun"; values add up to 1
        for each conditional. `jvlm plan` weighs the branches by them; empty without conditionals.
        """
        return {}


@dataclasses.dataclass(frozen=True)
class ConnectorConfig(Tagged):
    """Base of connector configurations. Nothing is required beyond what stands here."""

    required: ClassVar[Mapping[str, str]] = {}
    module_required: ClassVar[Mapping[str, str]] = {
        "__call__": "(VisionTokens, batch) -> VisionTokens of the decoder's width"
    }

    @property
    def tokens_per_image(self) -> int | None:
        """Vision tokens of an image whatever its size; None where the number follows from the image's patches."""
        return None

    @property
    def min_image_patches(self) -> int:
        """Images with fewer patches are refused."""
        return 1

    @property
    def patches_per_token(self) -> int:
        """Patches that become one vision token, where that does not depend on the image."""
        return 1

    def work(self, counts: Counts, d_in: int, d_out: int) -> Work:
        """Return the arithmetic of a forward pass between towers of these widths. Raises TypeError as an encoder's."""
        raise _undeclared(self)


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Tagged):
    """Base of decoder configurations. A configuration declares:

    vocab_size: number of rows of the embedding.
    hidden_size: width of the hidden states, and of the vision tokens that a connector makes for this decoder.
    max_position_embeddings: positions that generation may use.
    """

    required: ClassVar[Mapping[str, str]] = {
        "vocab_size": "number of rows of the embedding",
        "hidden_size": _WIDTH,
        "max_position_embeddings": "positions that generation may use",
    }
    module_required: ClassVar[Mapping[str, str]] = {
        "embed": "(tokens) -> embeddings",
        "fuse": "(embeddings, VisionTokens | None, batch) -> DecoderInputs",
        "__call__": "(DecoderInputs, *, cache, step) -> DecoderOutput",
        "logits": "(hidden states) -> float32 scores over the vocabulary",
        "output_kernel": "() -> (matrix behind logits, whether the vocabulary is its first axis)",
    }

    @property
    def uses_mrope(self) -> bool:
        """Whether positions differ between the axes (t, h, w); otherwise the three ids of a token are equal."""
        return False

    @property
    def vision_memory(self) -> Literal["last", "all"] | None:
        """Which images of its conversation a token reads beside the text; None where the text holds vision tokens."""
        return None

    @property
    def prefills_whole(self) -> bool:
        """Whether a prompt must be computed in one pass: a chunk of it could not read what came before."""
        return self.vision_memory is not None

    def placeholders(self, vision_tokens: int) -> int:
        """Return how many tokens of text stand for an image that has so many vision tokens."""
        return vision_tokens

    def work(self, counts: Counts, tokens_per_image: int | None) -> Work:
        """Return the arithmetic of a forward pass without the output head. Raises TypeError as an encoder's.

        Args:
          tokens_per_image: `ConnectorConfig.tokens_per_image`.
        """
        raise _undeclared(self)

    def decode_work(self, sequences: int, cache_len: int, tokens_per_image: int | None) -> Work:
        """Return the arithmetic of one new token for each sequence, after ``cache_len`` others, without the head."""
        raise _undeclared(self)


@dataclasses.dataclass(frozen=True)
class MLPConfig(Tagged):
    """Base of configurations of what decoder layers may have in place of the dense SwiGLU, experts say.

    The module is built with ``width=``, ``precision=`` and ``rngs=``.

    Attributes:
      every: every n-th layer has it, the n-th being the first.
    """

    required: ClassVar[Mapping[str, str]] = {}
    module_required: ClassVar[Mapping[str, str]] = {
        "__call__": "(x [B, S, D], segment_ids [B, S]) -> (y [B, S, D], reports by name)"
    }

    every: int = 1

    def products(self, tokens: float | int, width: int) -> tuple[Product, ...]:
        """Return what one layer multiplies, of ``width`` channels. Raises TypeError as an encoder's ``work``."""
        raise _undeclared(self)


def _undeclared(config: Any) -> TypeError:
    return TypeError(f"the arithmetic of {type(config).__name__} is not known: it does not define `work`")


KINDS = (EncoderConfig, ConnectorConfig, DecoderConfig, MLPConfig)


def problems(config_type: type, module_type: type) -> list[str]:
    """Return a line for each member that a part lacks, with what it is for."""
    kind = next((kind for kind in KINDS if issubclass(config_type, kind)), None)
    if kind is None:
        return [f"{config_type.__name__} derives from none of {', '.join(kind.__name__ for kind in KINDS)}"]
    fields = {field.name for field in dataclasses.fields(config_type)}
    lines = [
        f"{config_type.__name__}.{name}: {purpose}"
        for name, purpose in kind.required.items()
        if name not in fields and not hasattr(config_type, name)
    ]
    return lines + [
        f"{module_type.__name__}.{name}: {purpose}"
        for name, purpose in kind.module_required.items()
        if not any(name in vars(base) for base in module_type.__mro__)
    ]


def check_generates(decoder: Decoder) -> None:
    """Raise UserError where a decoder has no cache to generate with."""
    if not callable(getattr(decoder, "init_cache", None)):
        raise UserError(f"{type(decoder).__name__} cannot generate: it lacks init_cache(sizes)")


def replace_placeholders(
    embeddings: Float[Array, "B S D"], vision: VisionTokens | None, batch: PackedBatch
) -> Float[Array, "B S D"]:
    """Return the embeddings with those of media tokens replaced by the vision tokens that feed them."""
    if vision is None:
        return embeddings
    index = jnp.asarray(batch.vision_index)
    fed = device_ops.current().gather_vision_tokens(vision.tokens, index)
    return jnp.where((index >= 0)[..., None], fed.astype(embeddings.dtype), embeddings)


def deepstack_at_tokens(
    vision: VisionTokens | None, batch: PackedBatch, dtype: DTypeLike
) -> Float[Array, "n B S D"] | None:
    """Return what `DecoderInputs.deepstack` is for these vision tokens."""
    if vision is None or not vision.deepstack:
        return None
    index, ops = jnp.asarray(batch.vision_index), device_ops.current()
    fed = [ops.gather_vision_tokens(tokens.astype(dtype), index) for tokens in vision.deepstack]
    return jnp.where((index >= 0)[None, ..., None], jnp.stack(fed), 0)


def image_ids_of(
    patch_segment_ids: Int[Array | np.ndarray, "B P"], tokens_per_image: int, max_images: int
) -> Int[Array, "B F"]:
    """Return the image of each vision token where every image has as many; 0 for images that a sequence lacks."""
    ids = jnp.repeat(jnp.arange(1, max_images + 1, dtype=patch_segment_ids.dtype), tokens_per_image)
    return jnp.where(ids <= patch_segment_ids.max(axis=1, keepdims=True), ids, 0)

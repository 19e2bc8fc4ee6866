"""The assembly of encoder, connector and decoder, whatever they are (`jvlm.models.contracts`).

Axes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jvlm.adapters.layers import AdapterParam, StepValue
from jvlm.models import registry
from jvlm.models.batch import DecoderOutput, PackedBatch
from jvlm.models.contracts import ConnectorConfig, DecoderConfig, EncoderConfig, VisionTokens
from jvlm.models.layers import Precision, StoredKernel
from jvlm.models.token_ids import token_ids

TOWERS = ("encoder", "connector", "decoder")
_BASE = nnx.All(nnx.Param, nnx.Not(AdapterParam))


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """A vision-language model: encoder, connector, decoder, special token ids and precision.

    Attributes:
      family: name of the `jvlm.families.Family` that it belongs to.
      encoder: configuration of the encoder; its type chooses the module, as with the others.
      connector: configuration of the connector.
      decoder: configuration of the decoder.
      image_token_id: placeholder that the vision tokens of an image replace.
      video_token_id: the same for a video; None writes a video as a list of images.
      vision_start_token_id: token before an image or a video; None where the family has none.
      vision_end_token_id: token after an image or a video; None where the family has none.
      vision_pad_token_id: token that stands for media elsewhere; None where the family has none.
      bos_token_id: token that begins a text, as in the checkpoint's configuration.
      eos_token_id: token that ends an answer, as in the checkpoint's configuration; there may be several.
      precision: dtypes, recomputation and attention implementation.
    """

    family: str
    encoder: EncoderConfig
    connector: ConnectorConfig
    decoder: DecoderConfig
    image_token_id: int
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    vision_pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    precision: Precision = Precision()

    @property
    def placeholders_per_image(self) -> int | None:
        """Tokens of text that stand for an image; None where the number follows from the image's patches."""
        tokens = self.connector.tokens_per_image
        return None if tokens is None else self.decoder.placeholders(tokens)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return token_ids(self.eos_token_id, "eos_token_id")

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """Tokens that stand for media or bracket them: generation must never sample one."""
        ids = (
            self.image_token_id,
            self.video_token_id,
            self.vision_start_token_id,
            self.vision_end_token_id,
            self.vision_pad_token_id,
        )
        return tuple(sorted({i for i in ids if i is not None}))


@runtime_checkable
class EmbeddingChange(Protocol):
    """Changes the input embeddings of a pass, before vision tokens are put in and afterwards."""

    def of_text(self, embeddings: Float[Array, "B S D"], batch: PackedBatch) -> Float[Array, "B S D"]:
        """Return the embeddings of the tokens, changed or not."""

    def of_merged(self, embeddings: Float[Array, "B S D"], batch: PackedBatch) -> Float[Array, "B S D"]:
        """Return the embeddings with vision tokens in the place of their placeholders, changed or not."""


class VLM(nnx.Module):
    """A vision-language model. Call it with a `PackedBatch` for logits.

    Attributes:
      adapters: the `jvlm.adapters.plan.AdapterPlan` of its adapters; None without any.
    """

    def __init__(self, config: VLMConfig, *, rngs: nnx.Rngs):
        self.config, self.adapters = config, None
        common = {"precision": config.precision, "rngs": rngs}
        self.encoder = registry.build(config.encoder, **common)
        self.connector = registry.build(
            config.connector,
            d_in=config.encoder.hidden_size,
            d_out=config.decoder.hidden_size,
            placeholders_per_image=config.placeholders_per_image,
            **common,
        )
        self.decoder = registry.build(config.decoder, **common)

    def __call__(self, batch: PackedBatch) -> Float[Array, "B S V"]:
        """Return the logits of every token, float32. Compiled once for each shape and mesh."""
        return _logits(*nnx.split(self), batch)

    def encode(self, batch: PackedBatch) -> VisionTokens | None:
        """Return the vision tokens of every sequence; None where the batch has no room for patches."""
        if batch.patches.shape[1] == 0:
            return None
        with jax.named_scope("encoder"):
            patches = self.encoder(batch)
        with jax.named_scope("connector"):
            return self.connector(patches, batch)

    def hidden(
        self, batch: PackedBatch, noise: EmbeddingChange | None = None, *, vision: VisionTokens | None = None
    ) -> DecoderOutput:
        """Return the last hidden states, the cache of the decoder, and what its layers report.

        Args:
          noise: changes the embeddings, in training.
          vision: what `encode` returned for this batch; None encodes it.
        """
        embeddings = self.decoder.embed(jnp.asarray(batch.tokens))
        if noise is not None:
            embeddings = noise.of_text(embeddings, batch)
        inputs = self.decoder.fuse(embeddings, self.encode(batch) if vision is None else vision, batch)
        if noise is not None:
            inputs = dataclasses.replace(inputs, embeddings=noise.of_merged(inputs.embeddings, batch))
        with jax.named_scope("decoder"):
            return self.decoder(inputs)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nnx.GraphDef, state: nnx.State, batch: PackedBatch):
    model = nnx.merge(graph, state)
    return model.decoder.logits(model.hidden(batch).hidden)


def abstract(config: VLMConfig) -> VLM:
    """Return a model of shapes without arrays: for counting, loading and planning."""
    return nnx.merge(*_structure(config), copy=True)


@functools.lru_cache(maxsize=16)
def _structure(config: VLMConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Trace the modules once: a load, a plan and a start of a run each ask several times."""
    return nnx.split(nnx.eval_shape(lambda: VLM(config, rngs=nnx.Rngs(0))))


def parameters(model: VLM) -> dict[str, nnx.Variable]:
    """Return dotted path -> variable, for every parameter of a model; those of adapters are not among them."""
    return {path: variable for path, variable in variables(model).items() if not isinstance(variable, AdapterParam)}


def parameter_shapes(config: VLMConfig) -> Mapping[str, tuple[int, ...]]:
    """Return dotted path -> shape, for every parameter of a configuration's model."""
    return _shapes(dataclasses.replace(config, precision=Precision()))  # on which no shape depends


@functools.lru_cache(maxsize=16)
def _shapes(config: VLMConfig) -> Mapping[str, tuple[int, ...]]:
    found = {path: tuple(v.get_value().shape) for path, v in parameters(abstract(config)).items()}
    return MappingProxyType(found)


def variables(model: VLM) -> dict[str, nnx.Variable]:
    """Return dotted path -> variable, for every parameter of a model and of its adapters."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable for path, variable in flat}


def bind(template: VLM, values: Mapping[str, Any]) -> VLM:
    """Return the model of a template (abstract or not) with its parameters taken from path -> array.

    Variables of adapters that have no value there stay as the template has them.
    """
    graph, state = nnx.split(template)
    bound = []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        keep = isinstance(variable, AdapterParam | StepValue) and name not in values
        bound.append((path, variable if keep else variable.replace(values[name])))
    return nnx.merge(graph, nnx.from_flat_state(bound))


def parameter_counts(model: VLM) -> dict[str, int]:
    """Return the number of parameters of each tower, without those of adapters.

    A kernel in another form counts as its values would.
    """
    return {tower: _count(getattr(model, tower)) for tower in TOWERS}


def _count(tower: nnx.Module) -> int:
    stored = [module for _, module in nnx.iter_modules(tower) if isinstance(module, StoredKernel)]
    held, parts = (
        sum(leaf.size for leaf in jax.tree.leaves([nnx.state(m, _BASE) for m in modules]))
        for modules in ([tower], stored)
    )
    return held - parts + sum(math.prod(kernel.stacked_shape) for kernel in stored)

"""The assembly: encoder, connector, decoder.

Axes: B rows, S tokens, P patches, F vision features, D decoder width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jvlm.errors import UserError
from jvlm.models import device_ops, registry
from jvlm.models.batch import DecoderOutput, PackedBatch
from jvlm.models.connectors.perceiver import frames_of_features
from jvlm.models.decoders.cross_attention import Media, frames_in_reach
from jvlm.models.layers import Precision
from jvlm.models.token_ids import token_ids

TOWERS = ("encoder", "connector", "decoder")


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """A vision-language model: encoder, connector, decoder, special token ids and precision.

    Attributes:
      architecture: name of the weight table and of the host-side vision layout, e.g. "qwen2_5_vl".
      encoder, connector, decoder: the three parts; their types choose the modules.
      image_token_id, video_token_id: placeholders that vision features replace; without one of its own, a video is
        a list of images.
      vision_start_token_id, vision_end_token_id, vision_pad_token_id: other media tokens of Qwen's.
      bos_token_id, eos_token_id: as in the checkpoint's configuration; several tokens may end an answer.
      precision: dtypes, recomputation and attention implementation.
    """

    architecture: str
    encoder: registry.EncoderConfig
    connector: registry.ConnectorConfig
    decoder: registry.DecoderConfig
    image_token_id: int = 151655
    video_token_id: int | None = 151656
    vision_start_token_id: int | None = 151652
    vision_end_token_id: int | None = 151653
    vision_pad_token_id: int | None = 151654
    bos_token_id: int | None = 151643
    eos_token_id: int | tuple[int, ...] | None = 151645
    precision: Precision = Precision()

    @property
    def reads_features(self) -> bool:
        """Whether text reads features by cross-attention, instead of having them among its tokens."""
        return self.decoder.cross_attention_every > 0

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


class VLM(nnx.Module):
    """A vision-language model. Call it with a `PackedBatch` for logits."""

    def __init__(self, config: VLMConfig, *, rngs: nnx.Rngs):
        self.config = config
        common = {"precision": config.precision, "rngs": rngs}
        self.encoder = registry.build(config.encoder, **common)
        widths = {"d_in": config.encoder.hidden_size, "d_out": config.decoder.hidden_size}
        if config.reads_features and config.connector.frame_features is None:
            raise UserError("cross_attention_every needs a connector with a fixed number of features a frame")
        self.connector = registry.build(config.connector, **widths, **common)
        if config.reads_features:
            self.connector.frame_tokens = 1
        self.decoder = registry.build(config.decoder, **common)

    def __call__(self, batch: PackedBatch) -> Float[Array, "B S V"]:
        """Logits for every token, float32. Compiled once per shape; may be used inside a larger ``jit``."""
        return _logits(*nnx.split(self), batch)

    def encode(self, batch: PackedBatch) -> Float[Array, "B F D"]:
        """Vision features of every row, as the decoder sees them; `PackedBatch.vision_index` points into them."""
        with jax.named_scope("encoder"):
            features = self.encoder(batch)
        with jax.named_scope("connector"):
            return self.connector(features, batch)

    def embed(self, batch: PackedBatch) -> Float[Array, "B S D"]:
        """Token embeddings with vision features in the places of the media tokens."""
        x_BSD = self.decoder.embed(jnp.asarray(batch.tokens))
        if self.config.reads_features:
            return x_BSD
        if batch.patches.shape[1] == 0:
            return x_BSD
        index = jnp.asarray(batch.vision_index)
        features = device_ops.current().gather_vision_tokens(self.encode(batch), index)
        return jnp.where((index >= 0)[..., None], features.astype(x_BSD.dtype), x_BSD)

    def _media(self, batch: PackedBatch) -> Media | None:
        """What cross-attention layers read: a token with a feature opens the feature's frame."""
        if not self.config.reads_features or batch.patches.shape[1] == 0:
            return None
        features, n = self.encode(batch), self.config.connector.frame_features
        frames = frames_of_features(jnp.asarray(batch.patch_segment_ids), n, features.shape[1] // n)
        index = jnp.asarray(batch.vision_index)
        opened = jnp.where(index >= 0, index // n + 1, 0)
        reach = self.config.decoder.cross_attention_reach
        return Media(features, frames, *frames_in_reach(opened, jnp.asarray(batch.segment_ids), reach))

    def hidden(self, batch: PackedBatch) -> DecoderOutput:
        """Last hidden states, the keys and values of every layer for a cache, and what layers report."""
        x_BSD, media = self.embed(batch), self._media(batch)
        with jax.named_scope("decoder"):
            return self.decoder(
                x_BSD,
                jnp.asarray(batch.positions),
                jnp.asarray(batch.segment_ids),
                media=media,
                max_segment_length=batch.max_segment_length,
            )


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nnx.GraphDef, state: nnx.State, batch: PackedBatch):
    model = nnx.merge(graph, state)
    return model.decoder.logits(model.hidden(batch).hidden)


def abstract(config: VLMConfig) -> VLM:
    """A model of shapes without arrays: for counting, loading and planning."""
    return nnx.eval_shape(lambda: VLM(config, rngs=nnx.Rngs(0)))


def parameters(model: VLM) -> dict[str, nnx.Variable]:
    """Dotted path -> variable, for every parameter of a model."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable for path, variable in flat}


def bind(template: VLM, values: Mapping[str, Any]) -> VLM:
    """The model of a template (abstract or not) with its parameters taken from path -> array."""
    graph, state = nnx.split(template)
    bound = [(path, v.replace(values[".".join(map(str, path))])) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(bound))


def parameter_counts(model: VLM) -> dict[str, int]:
    """Number of parameters of each tower."""
    return {
        tower: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(getattr(model, tower), nnx.Param)))
        for tower in TOWERS
    }

"""The packed batch that every model takes, a step of decoding, and what a decoder returns.

Axes: B packed sequences, S tokens and P patches of a sequence, c numbers in a flattened patch, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Num


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Conversations packed into sequences of fixed shape, built on the host.

    Everything that depends on the data (image grids, window order, M-RoPE ids, which vision token feeds which text
    token) is computed before the device sees it. Segments are contiguous in every sequence. An image is a picture, a
    tile of one, or a video frame.

    Attributes:
      tokens: token ids; a placeholder where a vision token goes.
      segment_ids: number of the conversation in its sequence, from 1; 0 is padding.
      positions: rotary ids (t, h, w); three equal ids for text and for models with 1-D rotary embeddings.
      loss_weights: weight of each token as a target; 0 for prompt, media and padding.
      patches: pixels, uint8 0..255 or already normalised floats, in the order that the encoder expects.
      patch_segment_ids: number of the image in its sequence, from 1; 0 is padding.
      patch_window_ids: number of the attention window in its sequence, from 1; 0 is padding.
      patch_positions: (h, w) of the patch in its image.
      vision_index: index, in its sequence, of the vision token that feeds this token; -1 for text. Vision tokens are
        counted in the order of their images.
      max_segment_length: no conversation is longer (static); lets attention skip keys that are too far away.
      max_image_patches: no image has more patches (static).
    """

    tokens: Int[Array | np.ndarray, "B S"]
    segment_ids: Int[Array | np.ndarray, "B S"]
    positions: Int[Array | np.ndarray, "B S 3"]
    loss_weights: Float[Array | np.ndarray, "B S"]
    patches: Num[Array | np.ndarray, "B P c"]
    patch_segment_ids: Int[Array | np.ndarray, "B P"]
    patch_window_ids: Int[Array | np.ndarray, "B P"]
    patch_positions: Int[Array | np.ndarray, "B P 2"]
    vision_index: Int[Array | np.ndarray, "B S"]
    max_segment_length: int | None = dataclasses.field(default=None, metadata={"static": True})
    max_image_patches: int | None = dataclasses.field(default=None, metadata={"static": True})

    def max_images(self, placeholders: int, min_patches: int = 1) -> int:
        """Return how many images a sequence has room for.

        Args:
          placeholders: tokens of text that stand for an image.
          min_patches: no image has fewer patches.
        """
        return max(1, min(self.tokens.shape[1] // placeholders, self.patches.shape[1] // min_patches))

    @property
    def text_padding(self) -> float:
        """Fraction of the tokens that are padding (host arrays only)."""
        return float(np.mean(np.asarray(self.segment_ids) == 0))

    @property
    def patch_padding(self) -> float:
        """Fraction of the patches that are padding (host arrays only)."""
        ids = np.asarray(self.patch_segment_ids)
        return float(np.mean(ids == 0)) if ids.size else 0.0


def axes(field: str) -> tuple[str, str]:
    """Return the logical axes of the first two dimensions of a field of `PackedBatch`; the others are never split."""
    return ("batch", "patches" if field.startswith("patch") else "sequence")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """One new token for each sequence: it is written at ``cache_index`` and attends to itself and what is before it."""

    cache_index: Int[Array, " B"]


class DecoderOutput(NamedTuple):
    """What a pass through a decoder returns.

    Attributes:
      hidden: hidden states after the last norm.
      cache: what later tokens need of these, such as the keys and values of every layer.
      aux: what layers report (balance losses, router statistics), by name: one entry for each layer that reports it.
        "loss" is added to the training loss.
    """

    hidden: Float[Array, "B S D"]
    cache: Any
    aux: dict[str, Array]

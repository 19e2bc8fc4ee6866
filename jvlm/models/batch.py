"""What goes into and through every model: the packed batch, a step of decoding, and what a decoder gives.

Axes: B rows, S tokens of a row, P patches of a row, c values of a flattened patch, T places of a cache.
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
    """Conversations packed into rows of fixed shape, built on the host.

    Everything that depends on the data (image grids, window order, M-RoPE ids, which vision feature feeds which
    token) is computed before the device sees it. Segments are contiguous in every row.

    Attributes:
      tokens: token ids; a media placeholder where a vision feature goes.
      segment_ids: number of the conversation in its row, from 1; 0 is padding.
      positions: rotary ids (t, h, w); three equal ids for text and for models with 1-D rotary embeddings.
      loss_weights: weight of each token as a target; 0 for prompt, media and padding.
      patches: pixels, uint8 0..255 or already normalised floats, in the order the encoder wants them.
      patch_segment_ids: number of the frame in its row, from 1; 0 is padding.
      patch_window_ids: number of the attention window in its row, from 1; 0 is padding.
      patch_positions: (h, w) of the patch in its frame.
      vision_index: which vision feature of the row feeds this token; -1 for text. Features are counted in the order
        of their frames: where each frame has n, feature j is one of frame j // n + 1.
      max_segment_length: no conversation is longer (static); lets attention skip what is out of reach.
      max_frame_patches: no frame has more patches (static).
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
    max_frame_patches: int | None = dataclasses.field(default=None, metadata={"static": True})

    def most_frames(self, features: int, least_patches: int = 1) -> int:
        """Most frames that a row can hold when each feeds ``features`` tokens: what a connector lays out.

        ``least_patches`` says that no frame has fewer.
        """
        return max(1, min(self.tokens.shape[1] // features, self.patches.shape[1] // least_patches))

    @property
    def text_padding(self) -> float:
        """Share of the token places that hold nothing (host arrays only)."""
        return float(np.mean(np.asarray(self.segment_ids) == 0))

    @property
    def patch_padding(self) -> float:
        """Share of the patch places that hold nothing (host arrays only)."""
        ids = np.asarray(self.patch_segment_ids)
        return float(np.mean(ids == 0)) if ids.size else 0.0


def axes(field: str) -> tuple[str, str]:
    """Logical axes of the first two dimensions of a field of `PackedBatch`; the others are never split."""
    return ("batch", "patches" if field.startswith("patch") else "sequence")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """One new token a row: its place in the cache, where it sees all that is before it and itself."""

    place: Int[Array, " B"]


class DecoderOutput(NamedTuple):
    """What a pass through the decoder gives.

    Attributes:
      hidden: states after the last norm.
      cache: keys and values of every layer.
      aux: what layers report beside it (balance losses, router statistics), by name, one entry a layer that has it.
    """

    hidden: Float[Array, "B S D"]
    cache: Any
    aux: dict[str, Array]

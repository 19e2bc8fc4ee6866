"""The packed batch that every model takes. It is built by data pipelines, so this module imports no jax.

`jvlm.models.batch` registers the class as a pytree. Axes: B packed sequences, S tokens and P patches of a sequence,
c numbers in a flattened patch. The batches of a step that accumulates gradients are stacked along a leading axis A.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Conversations packed into sequences of fixed shape: numpy arrays when built on the host, then arrays of JAX.

    Everything that depends on the data (image grids, window order, M-RoPE ids, which vision token feeds which text
    token) is computed before the device sees it. Segments are contiguous in every sequence. Tiles of an image
    and video frames count as images.

    Attributes:
      tokens: token ids; a placeholder where a vision token goes.
      segment_ids: number of the conversation in its sequence, from 1; 0 is padding.
      positions: rotary ids (t, h, w); three equal ids for text and for models with 1-D rotary embeddings.
      loss_weights: weight of each token as a target; 0 for prompt, media and padding.
      patches: pixels, uint8 0..255 or already normalised floats, in the order that the encoder expects.
      patch_segment_ids: number of the image in its sequence, from 1; 0 is padding.
      patch_window_ids: number of the attention window in its sequence, from 1; 0 is padding.
      patch_positions: (h, w) of the patch in its image, and what else of its place the encoder reads
        (`EncoderConfig.position_values` numbers).
      vision_index: index, in its sequence, of the vision token that feeds this token; -1 for text. Vision tokens are
        counted in the order of their images.
      max_segment_length: no conversation is longer (static); lets attention skip keys that are too far away.
      max_image_patches: no image has more patches (static).
    """

    tokens: Int[Any, "*A B S"]
    segment_ids: Int[Any, "*A B S"]
    positions: Int[Any, "*A B S 3"]
    loss_weights: Float[Any, "*A B S"]
    patches: Num[Any, "*A B P c"]
    patch_segment_ids: Int[Any, "*A B P"]
    patch_window_ids: Int[Any, "*A B P"]
    patch_positions: Int[Any, "*A B P n"]
    vision_index: Int[Any, "*A B S"]
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

"""The image processor: every image becomes a square of patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from jvlm.data.image_processor import ImageProcessorConfig, Limit, MediaPatches
from jvlm.errors import UserError
from jvlm.models.vlm import VLMConfig


@dataclasses.dataclass(frozen=True)
class ToyImageConfig(ImageProcessorConfig, tag="toy_vlm"):
    """Settings, saved with every model.

    Attributes:
      grid: patches along the side of an image.
    """

    # what "chat_template_kwargs" of an example, and the command line (--grid 3), may change
    limits: ClassVar[dict[str, Limit]] = {"grid": Limit(most=64, help="patches along the side of an image")}

    grid: int = 2

    def build(self, model: VLMConfig) -> ToyImageProcessor:
        """Return the image processor of a model."""
        return ToyImageProcessor(model)


class ToyImageProcessor:
    """Makes `MediaPatches` of images: n patches, which are n vision tokens and n tokens of text."""

    patch_group = 1
    delimiter_tokens = ()
    merged_delimiter = None

    def __init__(self, model: VLMConfig):
        self.patch_size, self.patch_values = model.encoder.patch_size, model.encoder.patch_values

    def image(self, image: Image.Image, config: ToyImageConfig, *, index: int = 0, count: int = 1) -> MediaPatches:
        """Return an image."""
        g, p = config.grid, self.patch_size
        pixels = np.asarray(image.resize((g * p, g * p), Image.Resampling.BILINEAR), np.uint8)
        # (row, y, column, x, channel) -> (row, column, channel, y, x)
        patches = pixels.reshape(g, p, g, p, 3).transpose(0, 2, 4, 1, 3).reshape(g * g, -1)
        ones = np.ones(g * g, np.int32)  # one segment, one attention window
        return MediaPatches(
            patches=patches,
            segment_ids=ones,
            window_ids=ones,
            positions=np.stack(np.divmod(np.arange(g * g, dtype=np.int32), g), -1),
            token_segment_ids=ones,
            vision_index=np.arange(g * g, dtype=np.int32),
            original=image.size,
            resized=(g * p, g * p),
        )

    def video(
        self, frames: Sequence[Image.Image], config: ToyImageConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Refuse videos."""
        raise UserError("this model takes no videos")

    def frame_size(self, config: ToyImageConfig) -> None:
        """Return nothing: there are no videos."""
        return None

    def max_image_patches(self, config: ToyImageConfig) -> int:
        """Return the patches of any image."""
        return config.grid**2

    def reductions(self, config: ToyImageConfig) -> list[list[dict[str, Any]]]:
        """Return smaller grids, for ``data.on_too_long="shrink"``."""
        return [[{"grid": grid} for grid in range(config.grid - 1, 0, -1)]]

"""Patches of images that all have the encoder's size: whole images, tiles and frames of videos."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jvlm.data.image_processor import ImageProcessorConfig, MediaPatches
from jvlm.errors import UserError
from jvlm.models.encoders.vit import CLASS_POSITION

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig


class TileProcessor:
    """Base of image processors whose tiles all have as many patches: a sequence's tiles are a plain array.

    Attributes:
      side: of a tile, in pixels.
      features: vision tokens of a tile.

    Raises:
      UserError: encoder and connector that do not agree about the patches of a tile.
    """

    delimiter_tokens: tuple[str, ...] = ()
    merged_delimiter: str | None = None

    def __init__(self, model: VLMConfig):
        encoder, connector = model.encoder, model.connector
        for name in ("grid", "class_token"):
            theirs = getattr(connector, name, getattr(encoder, name))
            if theirs != getattr(encoder, name):
                raise UserError(
                    f"connector.{name} is {theirs}, encoder.{name} {getattr(encoder, name)}: make them equal"
                )
        self.encoder, self.features = encoder, connector.tokens_per_image
        self.side = encoder.grid * encoder.patch_size
        self.patch_values = encoder.patch_values
        self.patch_group = encoder.grid**2 + encoder.class_token

    def frame_size(self, config: ImageProcessorConfig) -> None:
        """Frames keep their size."""
        return None

    def max_image_patches(self, config: ImageProcessorConfig) -> int:
        """Return the patches of a tile."""
        return self.patch_group

    def _written(self, media: MediaPatches, images: Sequence[Image.Image]) -> MediaPatches:
        """Return the layout with its patches."""
        patches = np.empty(media.patches.shape, np.uint8)
        self._write(images, patches)
        return dataclasses.replace(media, patches=patches)

    def _layout(
        self, n: int, pattern: tuple[str | int, ...], original: tuple[int, int], resized: tuple[int, int]
    ) -> MediaPatches:
        """Everything about n tiles, but for their pixels."""
        g, first = self.encoder.grid, int(self.encoder.class_token)
        positions = np.stack(np.divmod(np.arange(g * g, dtype=np.int32), g), -1)
        if first:
            positions = np.concatenate([np.array([CLASS_POSITION], np.int32), positions])
        numbers = np.arange(1, n + 1, dtype=np.int32)
        ids = np.repeat(numbers, self.patch_group)
        return MediaPatches(
            patches=np.broadcast_to(np.uint8(0), (n * self.patch_group, self.patch_values)),
            segment_ids=ids,
            window_ids=ids,
            positions=np.tile(positions, (n, 1)),
            token_segment_ids=np.repeat(numbers, self.features),
            vision_index=np.arange(n * self.features, dtype=np.int32),
            original=original,
            resized=resized,
            token_pattern=pattern,
        )

    def _write(self, images: Sequence[Image.Image], out: UInt8[np.ndarray, "n c"]) -> None:
        """Write the patches of tiles, those of a class token as zeros; pixels that fill no patch are left out."""
        p, g, first = self.encoder.patch_size, self.encoder.grid, int(self.encoder.class_token)
        for tile, image in zip(out.reshape(len(images), self.patch_group, -1), images, strict=True):
            tile[:first] = 0
            pixels = np.asarray(image, np.uint8)[: g * p, : g * p]
            # (h, y, w, x, c) -> (h, w, c, y, x)
            patches = pixels.reshape(g, p, g, p, -1).transpose(0, 2, 4, 1, 3)
            tile[first:].reshape(patches.shape)[:] = patches

"""Images and videos of Qwen3-VL: a resize of videos as a whole, and the times of their frames as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image

from jvlm.data.image_processor import MediaPatches
from jvlm.data.merged_images import MergedImageConfig, MergedImageProcessor
from jvlm.data.smart_resize import MAX_ASPECT
from jvlm.data.video.frame_times import with_times
from jvlm.data.video.sampling import Sampling
from jvlm.errors import UserError
from jvlm.families.qwen3_vl.chat_format import VISION_END, VISION_START

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig


@dataclasses.dataclass(frozen=True)
class Qwen3ImageConfig(MergedImageConfig, tag="qwen3_vl"):
    """Limits of the resize in pixels, and which frames of videos are taken. The defaults are the released ones.

    Attributes:
      video_min_pixels: least pixels of all frames of a video after the resize.
      video_max_pixels: most pixels of all frames of a video after the resize.
      min_frames: fewest frames that are taken of a video file.
      max_frames: most frames that are taken of a video file.
      cap_frames: a frame has at most ``frame_tokens`` tokens and its share of ``video_max_pixels``, but 1.05 times
        ``video_min_pixels`` at least, as qwen-vl-utils has it (``cap_pixels_per_frame``).
      frame_tokens: see ``cap_frames``.
    """

    bounds: ClassVar[dict[str, str]] = {
        **MergedImageConfig.bounds,
        **dict.fromkeys(("min_frames", "max_frames", "frame_tokens"), "[1, inf)"),
    }

    min_pixels: int = 64 * 1024
    max_pixels: int = 16384 * 1024
    video_min_pixels: int = 4 * 1024
    video_max_pixels: int = 24576 * 1024
    min_frames: int = 4
    max_frames: int = 768
    cap_frames: bool = False
    frame_tokens: int = 768

    def sampling(self) -> Sampling:
        """Return the rule of transformers' video processor."""
        return Sampling(fps=self.fps, min_frames=self.min_frames, max_frames=self.max_frames, pairs=False)

    def video_size(self, factor: int, pair: int, frames: int, width: int, height: int) -> tuple[int, int]:
        """(width, height) of each frame after the resize, as transformers' ``Qwen3VLVideoProcessor`` has it.

        Args:
          factor: pixels along the side of a merged patch, of which both sides become multiples.
          pair: frames of a temporal patch.

        Raises:
          UserError: an aspect ratio above 200, or fewer frames than a temporal patch.
        """
        if frames < pair:
            raise UserError(f"a video of {frames} frames, of which a patch takes {pair}: give more, or an image")
        least, most = self.video_min_pixels, self.video_max_pixels
        if self.cap_frames:
            share = min(self.frame_tokens * factor**2, most // frames)
            most = max(share, int(least * 1.05)) * frames
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise UserError(f"aspect ratio of {width} x {height} exceeds {MAX_ASPECT}")
        new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
        pixels = round(frames / pair) * pair * new_height * new_width
        if pixels > most:
            beta = math.sqrt(frames * height * width / most)
            new_height = max(factor, math.floor(height / beta / factor) * factor)
            new_width = max(factor, math.floor(width / beta / factor) * factor)
        elif pixels < least:
            beta = math.sqrt(least / (frames * height * width))
            new_height = math.ceil(height * beta / factor) * factor
            new_width = math.ceil(width * beta / factor) * factor
        return new_width, new_height

    def image_areas(self, pair: int) -> tuple[tuple[int, int], ...]:
        """(least, most) pixels after the resize, of an image and of a temporal patch.

        Of a video of the fewest frames, each of which has most: so many pixels may be those of one temporal patch.
        """
        frame = (-(-self.video_min_pixels // pair), -(-self.video_max_pixels // pair))
        return (self.min_pixels, self.max_pixels), frame

    def build(self, model: VLMConfig) -> Qwen3ImageProcessor:
        """Return the image processor of a model."""
        return Qwen3ImageProcessor(model)


class Qwen3ImageProcessor(MergedImageProcessor):
    """Places of patches come with the size of their image; each temporal patch is an image of its own in the text."""

    def video(
        self, frames: Sequence[Image.Image], limits: Qwen3ImageConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Return a video, each temporal patch behind the mean time of its first and last frame."""
        media, pair = super().video(frames, limits, times), self.config.temporal_patch_size
        given = {"frames": len(frames), "fps": limits.fps, "pair": pair}
        return with_times(media, times, **given, start=VISION_START, end=VISION_END)

    def _layout(self, frames: int, original: tuple[int, int], size: tuple[int, int]) -> MediaPatches:
        media = super()._layout(frames, original, size)
        _, h, w = media.grid
        image = np.array([h, w], np.int32) * self.config.spatial_merge_size
        positions = np.concatenate([media.positions, np.broadcast_to(image, media.positions.shape)], 1)
        return dataclasses.replace(media, positions=positions, grid=(1, h, w))

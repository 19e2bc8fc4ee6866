"""Images and videos of Qwen3-VL: resize, flatten, and the times of a video's frames as text.

Units: "patch" is patch_size pixels; "merged" is merge x merge patches, which become one token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jvlm.data.image_processor import MAX_PIXELS, ImageProcessorConfig, Limit, MediaPatches
from jvlm.data.merged_patches import write_merged
from jvlm.data.smart_resize import MAX_ASPECT, largest_area, smart_resize
from jvlm.data.video.sampling import Sampling, SizeRule
from jvlm.errors import UserError
from jvlm.families.qwen3_vl.chat_format import VISION_END, VISION_START
from jvlm.validation import check_fields

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig

_SHRINK = 0.9  # of the pixels, a step of `Qwen3ImageProcessor.reductions`


@dataclasses.dataclass(frozen=True)
class Qwen3ImageConfig(ImageProcessorConfig, tag="qwen3_vl"):
    """Limits of the resize in pixels, and which frames of videos are taken. The defaults are the released ones.

    Attributes:
      min_pixels: least pixels of an image after the resize.
      max_pixels: most pixels of an image after the resize.
      video_min_pixels: least pixels of all frames of a video after the resize.
      video_max_pixels: most pixels of all frames of a video after the resize.
      fps: frames a second: taken of a video file, and assumed of a list of frames that does not say its own.
      min_frames: fewest frames that are taken of a video file.
      max_frames: most frames that are taken of a video file.
      cap_frames: a frame has at most ``frame_tokens`` tokens and its share of ``video_max_pixels``, but 1.05 times
        ``video_min_pixels`` at least, as qwen-vl-utils has it (``cap_pixels_per_frame``).
      frame_tokens: see ``cap_frames``.
      resample: Pillow's number of the filter; 3 is bicubic.
      resize: False takes images as they are; their sides must then be whole merged patches.
      no_videos: why videos are refused; empty if they are not.
    """

    limits: ClassVar[dict[str, Limit]] = {
        "min_pixels": Limit(most=MAX_PIXELS, at_most="max_pixels", help="least pixels of an image after resizing"),
        "max_pixels": Limit(help="most pixels of an image after resizing"),
        "video_min_pixels": Limit(
            most=MAX_PIXELS, at_most="video_max_pixels", help="least pixels of a video frame after resizing"
        ),
        "video_max_pixels": Limit(help="most pixels of a video frame after resizing"),
        # beyond, times of frames leave the range of position ids
        "fps": Limit(1e-4, 1e4, whole=False, help="frames a second of a video"),
    }

    min_pixels: int = 64 * 1024
    max_pixels: int = 16384 * 1024
    video_min_pixels: int = 4 * 1024
    video_max_pixels: int = 24576 * 1024
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    cap_frames: bool = False
    frame_tokens: int = 768
    resample: int = Image.Resampling.BICUBIC.value
    resize: bool = True
    no_videos: str = ""

    def __post_init__(self):
        whole = "min_pixels max_pixels video_min_pixels video_max_pixels min_frames max_frames frame_tokens".split()
        bounds = {**dict.fromkeys(whole, "[1, inf)"), "fps": "(0, inf)", "resample": "[0, 5]"}
        check_fields(self, "processor.image.", bounds)

    def sampling(self) -> Sampling:
        """Return the rule of transformers' video processor."""
        return Sampling(fps=self.fps, min_frames=self.min_frames, max_frames=self.max_frames, pairs=False)

    def for_video(self, frames: int, fps: float, *, is_resized: bool) -> Qwen3ImageConfig:
        """Return the settings with the video's rate."""
        return dataclasses.replace(self, fps=fps, resize=self.resize and not is_resized)

    def build(self, model: VLMConfig) -> Qwen3ImageProcessor:
        """Return the image processor of a model."""
        return Qwen3ImageProcessor(model)


def video_size(
    limits: Qwen3ImageConfig, factor: int, pair: int, frames: int, width: int, height: int
) -> tuple[int, int]:
    """(width, height) of each of so many frames after the resize, as transformers' ``Qwen3VLVideoProcessor`` has it.

    Args:
      factor: pixels along the side of a merged patch, of which both sides become multiples.
      pair: frames of a temporal patch.

    Raises:
      UserError: an aspect ratio above 200, or fewer frames than a temporal patch.
    """
    if frames < pair:
        raise UserError(f"a video of {frames} frames, of which a patch takes {pair}: give more, or an image")
    least, most = limits.video_min_pixels, limits.video_max_pixels
    if limits.cap_frames:
        share = min(limits.frame_tokens * factor**2, most // frames)
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


class Qwen3ImageProcessor:
    """Turns images and frame lists into `MediaPatches` for one encoder configuration."""

    delimiter_tokens = ()
    merged_delimiter = None

    def __init__(self, model: VLMConfig):
        self.config = config = model.encoder
        self.factor = config.patch_size * config.spatial_merge_size
        self.patch_values = config.patch_values
        self.patch_group = config.spatial_merge_size**2

    def image(self, image: Image.Image, limits: Qwen3ImageConfig, *, index: int = 0, count: int = 1) -> MediaPatches:
        """Return an image; its temporal patch is the image repeated."""
        media = self.layout(image.size, limits, index=index, count=count)
        return self._written(media, [image], limits)

    def layout(
        self, size: tuple[int, int], limits: Qwen3ImageConfig, *, index: int = 0, count: int = 1
    ) -> MediaPatches:
        """Return `image` of an image of (width, height), with patches whose values mean nothing."""
        width, height = size
        if limits.resize:
            height, width = smart_resize(height, width, self.factor, limits.min_pixels, limits.max_pixels)
        return self._layout(1, size, (width, height))

    def write(
        self,
        image: Image.Image,
        limits: Qwen3ImageConfig,
        out: UInt8[np.ndarray, "n c"],
        *,
        index: int = 0,
        count: int = 1,
    ) -> None:
        """Write the patches of `image`."""
        self._write([image], self.layout(image.size, limits).resized, limits, out)

    def video(
        self, frames: Sequence[Image.Image], limits: Qwen3ImageConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Return a video; an incomplete last temporal patch repeats the last frame.

        Each temporal patch is an image of its own in the text, behind the mean time of its first and last frame.
        """
        if limits.no_videos:
            raise UserError(f"videos cannot be used with this model: {limits.no_videos}")
        pair, size = self.config.temporal_patch_size, frames[0].size
        if limits.resize:
            size = video_size(limits, self.factor, pair, len(frames), *size)
        media = self._written(self._layout(len(frames), frames[0].size, size), frames, limits)
        if times is None:
            times = [number / limits.fps for number in range(len(frames))]
        padded = [*times, *[times[-1]] * (-len(times) % pair)]
        shown = [f"<{(padded[i] + padded[i + pair - 1]) / 2:.1f} seconds>" for i in range(0, len(padded), pair)]
        run = media.vision_index.size // len(shown)
        between = (piece for time in shown[1:] for piece in (f"{VISION_END}{time}{VISION_START}", run))
        return dataclasses.replace(media, token_pattern=(run, *between), leading_text=shown[0])

    def frame_size(self, limits: Qwen3ImageConfig) -> SizeRule | None:
        """Return the resize of transformers' video processor."""
        if not limits.resize:
            return None
        return functools.partial(video_size, limits, self.factor, self.config.temporal_patch_size)

    def max_image_patches(self, limits: Qwen3ImageConfig) -> int | None:
        """Return the patches of the largest image that the resize gives; a temporal patch counts as one image."""
        if not limits.resize:
            return None
        pair = self.config.temporal_patch_size
        # of the fewest frames, each of which has most: so many pixels may be those of one temporal patch
        frame = (-(-limits.video_min_pixels // pair), -(-limits.video_max_pixels // pair))
        pairs = (limits.min_pixels, limits.max_pixels), frame
        return max(largest_area(self.factor, *pair) for pair in pairs) // self.config.patch_size**2

    def reductions(self, limits: Qwen3ImageConfig) -> list[list[dict[str, Any]]]:
        """Fewer pixels for images and videos, a tenth less at a time, down to one token."""
        if not limits.resize:
            return []
        cell, steps = self.factor**2, []
        share = 1.0
        while share * max(limits.max_pixels, limits.video_max_pixels) > cell:
            share *= _SHRINK
            most, video_most = (
                max(int(share * pixels), cell) for pixels in (limits.max_pixels, limits.video_max_pixels)
            )
            least, video_least = min(limits.min_pixels, most), min(limits.video_min_pixels, video_most)
            change = {"min_pixels": least, "max_pixels": most}
            steps.append({**change, "video_min_pixels": video_least, "video_max_pixels": video_most})
        return [steps]

    def _written(self, media: MediaPatches, images: Sequence[Image.Image], limits: Qwen3ImageConfig) -> MediaPatches:
        """Return the layout with its patches."""
        patches = np.empty(media.patches.shape, np.uint8)
        self._write(images, media.resized, limits, patches)
        return dataclasses.replace(media, patches=patches)

    def _write(
        self,
        images: Sequence[Image.Image],
        size: tuple[int, int],
        limits: Qwen3ImageConfig,
        out: UInt8[np.ndarray, "n c"],
    ) -> None:
        config = self.config
        p, m, tp = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
        write_merged(images, size, Image.Resampling(limits.resample), out, patch=p, merge=m, frames=tp)

    def _layout(self, frames: int, original: tuple[int, int], size: tuple[int, int]) -> MediaPatches:
        """Everything about frames that are resized to a size, but for their pixels: cells in raster order."""
        config = self.config
        if any(side % self.factor for side in size):
            raise UserError(
                f"{size[0]} x {size[1]} pixels are not whole patches of {self.factor}, and do_resize is off for this "
                "model"
            )
        m, t = config.spatial_merge_size, -(-frames // config.temporal_patch_size)
        h, w = size[1] // self.factor, size[0] // self.factor
        row, column = np.divmod(np.arange(h * w), w)
        inner = np.stack(np.divmod(np.arange(m * m), m), -1)
        positions = (np.stack([row, column], -1)[:, None] * m + inner).reshape(-1, 2)
        positions = np.concatenate([positions, np.full_like(positions, (h * m, w * m))], 1).astype(np.int32)
        segments = np.arange(1, t + 1, dtype=np.int32)
        of_patches = np.repeat(segments, h * w * m * m)
        return MediaPatches(
            patches=np.broadcast_to(np.uint8(0), (len(of_patches), config.patch_values)),
            segment_ids=of_patches,
            window_ids=of_patches,
            positions=np.tile(positions, (t, 1)),
            token_segment_ids=np.repeat(segments, h * w),
            vision_index=np.arange(t * h * w, dtype=np.int32),
            original=original,
            resized=size,
            grid=(1, h, w),
        )

"""Images and videos of native resolution in patches that are merged: what the Qwen-VL families share.

Units: "patch" is patch_size pixels; "merged" is merge x merge patches, which become one token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from jvlm.data.image_processor import MAX_PIXELS, ImageProcessorConfig, Limit, MediaPatches
from jvlm.data.merged_patches import write_merged
from jvlm.data.smart_resize import largest_area, smart_resize
from jvlm.data.video.sampling import SizeRule
from jvlm.errors import UserError
from jvlm.validation import check_fields

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig

_SHRINK = 0.9  # of the pixels, a step of `MergedImageProcessor.reductions`


@dataclasses.dataclass(frozen=True)
class MergedImageConfig(ImageProcessorConfig):
    """Base of the settings: limits of the resize in pixels, and the frame rate of videos.

    Attributes:
      min_pixels: least pixels of an image after the resize.
      max_pixels: most pixels of an image after the resize.
      video_min_pixels: least pixels of a video frame after the resize.
      video_max_pixels: most pixels of a video frame after the resize.
      fps: frames a second: taken of a video file, and assumed of a list of frames that does not say its own.
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
    bounds: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels"), "[1, inf)"),
        "fps": "(0, inf)",
        "resample": "[0, 5]",
    }

    min_pixels: int = 4 * 784
    max_pixels: int = 16384 * 784
    video_min_pixels: int = 128 * 784
    video_max_pixels: int = 768 * 784
    fps: float = 2.0
    resample: int = Image.Resampling.BICUBIC.value
    resize: bool = True
    no_videos: str = ""

    def __post_init__(self):
        check_fields(self, "processor.image.", self.bounds)

    def for_video(self, frames: int, fps: float, *, is_resized: bool) -> Self:
        """Return the settings with the video's rate."""
        return dataclasses.replace(self, fps=fps, resize=self.resize and not is_resized)

    def video_size(self, factor: int, pair: int, frames: int, width: int, height: int) -> tuple[int, int]:
        """(width, height) of each of so many frames after the resize, of which each has its own limits.

        Args:
          factor: pixels along the side of a merged patch, of which both sides become multiples.
          pair: frames of a temporal patch.
        """
        height, width = smart_resize(height, width, factor, self.video_min_pixels, self.video_max_pixels)
        return width, height

    def image_areas(self, pair: int) -> tuple[tuple[int, int], ...]:
        """(least, most) pixels after the resize, of an image and of the frame of a video."""
        return (self.min_pixels, self.max_pixels), (self.video_min_pixels, self.video_max_pixels)


def _sampled_size(
    limits: MergedImageConfig, factor: int, pair: int, frames: int, width: int, height: int
) -> tuple[int, int]:
    """(width, height) of each of so many frames of a file after the resize."""
    limits = limits.for_video(frames, limits.fps, is_resized=False)
    return limits.video_size(factor, pair, frames, width, height)


def window_order(grid: tuple[int, int, int], window: int | None) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Order of merged cells by attention window, and the window number (from 1) of each.

    Args:
      grid: (t, h, w) in merged units. Windows never span temporal patches; those at the edges are smaller.
      window: side of a window in merged units; None has one window for each temporal patch.

    Returns:
      (order [t h w], window_ids [t h w]): ``order[i]`` is the raster index of the i-th cell.
    """
    t, h, w = grid
    window = window or max(h, w)
    across = -(-w // window)
    row, column = np.divmod(np.arange(h * w, dtype=np.int32), w)
    number = (row // window) * across + column // window
    order = np.argsort(number, kind="stable")
    _, number = np.unique(number[order], return_inverse=True)
    times = np.arange(t, dtype=np.int32)[:, None]
    return (times * (h * w) + order).ravel(), (times * (number.max() + 1) + number + 1).ravel().astype(np.int32)


class MergedImageProcessor:
    """Turns images and frame lists into `MediaPatches` for one encoder configuration.

    Attributes:
      window: side of an attention window in merged patches; None where all layers attend to the whole image.
    """

    delimiter_tokens = ()
    merged_delimiter = None
    window: int | None = None

    def __init__(self, model: VLMConfig):
        self.config = config = model.encoder
        self.factor = config.patch_size * config.spatial_merge_size
        self.patch_values = config.patch_values
        self.patch_group = config.spatial_merge_size**2

    def image(self, image: Image.Image, limits: MergedImageConfig, *, index: int = 0, count: int = 1) -> MediaPatches:
        """Return an image; its temporal patch is the image repeated."""
        return self._written(self.layout(image.size, limits, index=index, count=count), [image], limits)

    def layout(
        self, size: tuple[int, int], limits: MergedImageConfig, *, index: int = 0, count: int = 1
    ) -> MediaPatches:
        """Return `image` of an image of (width, height), with patches whose values mean nothing."""
        width, height = size
        if limits.resize:
            height, width = smart_resize(height, width, self.factor, limits.min_pixels, limits.max_pixels)
        return self._layout(1, size, (width, height))

    def write(
        self,
        image: Image.Image,
        limits: MergedImageConfig,
        out: UInt8[np.ndarray, "n c"],
        *,
        index: int = 0,
        count: int = 1,
    ) -> None:
        """Write the patches of `image`."""
        self._write([image], self.layout(image.size, limits).resized, limits, out)

    def video(
        self, frames: Sequence[Image.Image], limits: MergedImageConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Return a video of frames at ``limits.fps``; an incomplete last temporal patch repeats the last frame."""
        if limits.no_videos:
            raise UserError(f"videos cannot be used with this model: {limits.no_videos}")
        size = frames[0].size
        if limits.resize:
            size = limits.video_size(self.factor, self.config.temporal_patch_size, len(frames), *size)
        return self._written(self._layout(len(frames), frames[0].size, size), frames, limits)

    def frame_size(self, limits: MergedImageConfig) -> SizeRule | None:
        """Return the resize of a video's frames."""
        if not limits.resize:
            return None
        return functools.partial(_sampled_size, limits, self.factor, self.config.temporal_patch_size)

    def max_image_patches(self, limits: MergedImageConfig) -> int | None:
        """Return the patches of the largest image that the resize gives; a temporal patch counts as one image."""
        if not limits.resize:
            return None
        areas = limits.image_areas(self.config.temporal_patch_size)
        return max(largest_area(self.factor, *area) for area in areas) // self.config.patch_size**2

    def reductions(self, limits: MergedImageConfig) -> list[list[dict[str, Any]]]:
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

    def _layout(self, frames: int, original: tuple[int, int], size: tuple[int, int]) -> MediaPatches:
        """Everything about frames that are resized to (width, height), but for their pixels."""
        width, height = size
        if width % self.factor or height % self.factor:
            raise UserError(
                f"{width} x {height} pixels are not whole patches of {self.factor}, and do_resize is off for this model"
            )
        grid = -(-frames // self.config.temporal_patch_size), height // self.factor, width // self.factor
        layout = _patch_layout(grid, self.window, self.config.spatial_merge_size)
        return MediaPatches(
            patches=np.broadcast_to(np.uint8(0), (len(layout.segment_ids), self.patch_values)),
            segment_ids=layout.segment_ids,
            window_ids=layout.window_ids,
            positions=layout.positions,
            token_segment_ids=layout.token_segment_ids,
            vision_index=layout.vision_index,
            original=original,
            resized=size,
            grid=grid,
        )

    def _written(self, media: MediaPatches, images: Sequence[Image.Image], limits: MergedImageConfig) -> MediaPatches:
        """Return the layout with its patches."""
        patches = np.empty(media.patches.shape, np.uint8)
        self._write(images, media.resized, limits, patches)
        return dataclasses.replace(media, patches=patches)

    def _write(
        self,
        images: Sequence[Image.Image],
        size: tuple[int, int],
        limits: MergedImageConfig,
        out: UInt8[np.ndarray, "n c"],
    ) -> None:
        """Write the patches of frames, resized, in the order of windows."""
        config, order = self.config, None
        if self.window is not None:
            order, _ = _window_order((1, size[1] // self.factor, size[0] // self.factor), self.window)
        write_merged(
            images,
            size,
            Image.Resampling(limits.resample),
            out,
            patch=config.patch_size,
            merge=config.spatial_merge_size,
            frames=config.temporal_patch_size,
            order=order,
        )


_window_order = functools.lru_cache(maxsize=128)(window_order)


@dataclasses.dataclass(frozen=True)
class _PatchLayout:
    """What `MediaPatches` has of these names."""

    segment_ids: np.ndarray
    window_ids: np.ndarray
    positions: np.ndarray
    token_segment_ids: np.ndarray
    vision_index: np.ndarray


@functools.lru_cache(maxsize=128)
def _patch_layout(grid: tuple[int, int, int], window: int | None, merge: int) -> _PatchLayout:
    """Return where the patches of an image or video of (t, h, w) merged cells go. The arrays cannot be written."""
    _, h, w = grid
    order, windows = window_order(grid, window)
    time, cell = np.divmod(order, h * w)
    row, column = np.divmod(cell, w)
    inner = np.stack(np.divmod(np.arange(merge * merge), merge), -1)
    positions = np.stack([row, column], -1)[:, None] * merge + inner
    layout = _PatchLayout(
        segment_ids=np.repeat(time + 1, merge * merge).astype(np.int32),
        window_ids=np.repeat(windows, merge * merge),
        positions=positions.reshape(-1, 2).astype(np.int32),
        token_segment_ids=(time + 1).astype(np.int32),
        vision_index=np.argsort(order).astype(np.int32),
    )
    for field in dataclasses.fields(layout):
        getattr(layout, field.name).setflags(write=False)
    return layout

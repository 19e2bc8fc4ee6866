"""Images and videos of Qwen2.5-VL and MiMo-VL: resize, flatten, window order, and the ids that go with it.

Units: "patch" is patch_size pixels; "merged" is merge x merge patches, which become one token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from jvlm.data.image_processor import MAX_PIXELS, ImageProcessorConfig, Limit, MediaPatches
from jvlm.data.merged_patches import write_merged
from jvlm.data.smart_resize import largest_area, smart_resize
from jvlm.data.video.sampling import PATCH_AREA, FramePixels, Sampling, SizeRule
from jvlm.errors import UserError
from jvlm.validation import check_fields

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig

_SHRINK = 0.9  # of the pixels, a step of `QwenImageProcessor.reductions`


@dataclasses.dataclass(frozen=True)
class QwenImageConfig(ImageProcessorConfig, tag="qwen2_5_vl"):
    """Limits of the resize in pixels, and the frame rate of videos.

    The defaults are Qwen2.5-VL's: 4 to 16,384 tokens an image; 128 to 768 tokens a frame at 2 frames a second.

    Attributes:
      min_pixels: least pixels of an image after the resize.
      max_pixels: most pixels of an image after the resize.
      video_min_pixels: least pixels of a video frame after the resize.
      video_max_pixels: most pixels of a video frame after the resize.
      video_max_frames: most frames of a video file.
      video_max_tokens: most tokens of a video, kept however long it is; None has qwen-vl-utils' limit, which long
        videos exceed, since each frame gets ``video_min_pixels`` at least. MiMo-VL has 16,384, with 256 frames.
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
        "video_max_frames": Limit(2, help="most frames of a video file"),
        # beyond, times of frames leave the range of position ids
        "fps": Limit(1e-4, 1e4, whole=False, help="frames a second of a video"),
    }

    min_pixels: int = 4 * 784
    max_pixels: int = 16384 * 784
    video_min_pixels: int = 128 * 784
    video_max_pixels: int = 768 * 784
    video_max_frames: int = 768
    video_max_tokens: int | None = None
    fps: float = 2.0
    resample: int = Image.Resampling.BICUBIC.value
    resize: bool = True
    no_videos: str = ""

    def __post_init__(self):
        pixels = ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels")
        bounds = {"video_max_frames": "[2, inf)", "video_max_tokens": "[1, inf)"}
        bounds |= {**dict.fromkeys(pixels, "[1, inf)"), "fps": "(0, inf)", "resample": "[0, 5]"}
        check_fields(self, "processor.image.", bounds)

    def sampling(self) -> Sampling:
        """Return the rule of qwen-vl-utils at ``fps``."""
        return Sampling(fps=self.fps, max_frames=self.video_max_frames, min_frames=min(4, self.video_max_frames))

    def for_video(self, frames: int, fps: float, *, is_resized: bool) -> QwenImageConfig:
        """Return the settings with the video's rate, and with less for each frame the more frames there are."""
        pixels = {"min_pixels": self.video_min_pixels, "max_pixels": self.video_max_pixels}
        if self.video_max_tokens is not None:
            pixels |= {"total_pixels": self.video_max_tokens * PATCH_AREA, "is_hard": True}
        least, most = FramePixels(**pixels).limits(frames)
        area = {"video_min_pixels": min(least, int(most)), "video_max_pixels": int(most)}
        if self.video_max_tokens is None:
            del area["video_min_pixels"]
        return dataclasses.replace(self, fps=fps, resize=self.resize and not is_resized, **area)

    def build(self, model: VLMConfig) -> QwenImageProcessor:
        """Return the image processor of a model."""
        return QwenImageProcessor(model, self)


def _frame_size(limits: QwenImageConfig, factor: int, frames: int, width: int, height: int) -> tuple[int, int]:
    """(width, height) of each of so many frames after the resize."""
    limits = limits.for_video(frames, limits.fps, is_resized=False)
    height, width = smart_resize(height, width, factor, limits.video_min_pixels, limits.video_max_pixels)
    return width, height


def window_order(grid: tuple[int, int, int], window: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Order of merged cells by attention window, and the window number (from 1) of each.

    Args:
      grid: (t, h, w) in merged units. Windows never span temporal patches; those at the edges are smaller.
      window: side of a window in merged units.

    Returns:
      (order [t h w], window_ids [t h w]): ``order[i]`` is the raster index of the i-th cell.
    """
    t, h, w = grid
    across = -(-w // window)
    row, column = np.divmod(np.arange(h * w, dtype=np.int32), w)
    number = (row // window) * across + column // window
    order = np.argsort(number, kind="stable")
    _, number = np.unique(number[order], return_inverse=True)
    times = np.arange(t, dtype=np.int32)[:, None]
    return (times * (h * w) + order).ravel(), (times * (number.max() + 1) + number + 1).ravel().astype(np.int32)


class QwenImageProcessor:
    """Turns images and frame lists into `MediaPatches` for one encoder configuration."""

    delimiter_tokens = ()
    merged_delimiter = None

    def __init__(self, model: VLMConfig, limits: QwenImageConfig = QwenImageConfig()):
        self.config = config = model.encoder
        self.factor = config.patch_size * config.spatial_merge_size
        self.patch_values = config.patch_values
        self.patch_group = config.spatial_merge_size**2

    def image(self, image: Image.Image, limits: QwenImageConfig, *, index: int = 0, count: int = 1) -> MediaPatches:
        """Return an image; its temporal patch is the image repeated."""
        media = self.layout(image.size, limits, index=index, count=count)
        patches = np.empty(media.patches.shape, np.uint8)
        self.write(image, limits, patches, index=index, count=count)
        return dataclasses.replace(media, patches=patches)

    def layout(self, size: tuple[int, int], limits: QwenImageConfig, *, index: int = 0, count: int = 1) -> MediaPatches:
        """Return `image` of an image of (width, height), with patches whose values mean nothing."""
        return self._layout(size, 1, limits, (limits.min_pixels, limits.max_pixels), 0.0)

    def write(
        self,
        image: Image.Image,
        limits: QwenImageConfig,
        out: UInt8[np.ndarray, "n c"],
        *,
        index: int = 0,
        count: int = 1,
    ) -> None:
        """Write the patches of `image`."""
        self._write([image], limits, (limits.min_pixels, limits.max_pixels), out)

    def video(
        self, frames: Sequence[Image.Image], limits: QwenImageConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Return a video of frames at ``limits.fps``; an incomplete last temporal patch repeats the last frame."""
        if limits.no_videos:
            raise UserError(f"videos cannot be used with this model: {limits.no_videos}")
        seconds = self.config.temporal_patch_size / limits.fps
        step = seconds * self.config.tokens_per_second
        area = limits.video_min_pixels, limits.video_max_pixels
        media = self._layout(frames[0].size, len(frames), limits, area, step)
        patches = np.empty(media.patches.shape, np.uint8)
        self._write(frames, limits, area, patches)
        return dataclasses.replace(media, patches=patches)

    def frame_size(self, limits: QwenImageConfig) -> SizeRule | None:
        """Return the resize of qwen-vl-utils."""
        return functools.partial(_frame_size, limits, self.factor) if limits.resize else None

    def max_image_patches(self, limits: QwenImageConfig) -> int | None:
        """Return the patches of the largest image that the resize gives; a temporal patch counts as one image."""
        if not limits.resize:
            return None
        pairs = (limits.min_pixels, limits.max_pixels), (limits.video_min_pixels, limits.video_max_pixels)
        return max(largest_area(self.factor, *pair) for pair in pairs) // self.config.patch_size**2

    def reductions(self, limits: QwenImageConfig) -> list[list[dict[str, Any]]]:
        """Fewer pixels for images and frames of videos, a tenth less at a time, down to one token."""
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

    def size(self, height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
        """(height, width) after the resize."""
        return smart_resize(height, width, self.factor, min_pixels, max_pixels)

    def _resized(self, size: tuple[int, int], limits: QwenImageConfig, area: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of an image of that size as the encoder gets it."""
        width, height = size
        if limits.resize:
            height, width = self.size(height, width, *area)
        elif width % self.factor or height % self.factor:
            raise UserError(
                f"{width} x {height} pixels are not whole patches of {self.factor}, and do_resize is off for this model"
            )
        return width, height

    def _layout(
        self,
        size: tuple[int, int],
        frames: int,
        limits: QwenImageConfig,
        area: tuple[int, int],
        temporal_step: float,
    ) -> MediaPatches:
        config = self.config
        width, height = self._resized(size, limits, area)
        grid = -(-frames // config.temporal_patch_size), height // self.factor, width // self.factor
        layout = _patch_layout(grid, config.window_size // self.factor, config.spatial_merge_size)
        return MediaPatches(
            patches=np.broadcast_to(np.uint8(0), (len(layout.segment_ids), config.patch_values)),
            segment_ids=layout.segment_ids,
            window_ids=layout.window_ids,
            positions=layout.positions,
            token_segment_ids=layout.token_segment_ids,
            vision_index=layout.vision_index,
            original=size,
            resized=(width, height),
            grid=grid,
            temporal_step=temporal_step,
        )

    def _write(
        self,
        images: Sequence[Image.Image],
        limits: QwenImageConfig,
        area: tuple[int, int],
        out: UInt8[np.ndarray, "n c"],
    ) -> None:
        """Write the patches of frames, resized, in the order of windows."""
        config = self.config
        size = width, height = self._resized(images[0].size, limits, area)
        grid = 1, height // self.factor, width // self.factor
        order, _ = _window_order(grid, config.window_size // self.factor)
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
def _patch_layout(grid: tuple[int, int, int], window: int, merge: int) -> _PatchLayout:
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

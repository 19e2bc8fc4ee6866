"""Host side of the vision towers: what each encoder needs computed from pictures before the device sees them.

One file per encoder; each registers itself, so adding one adds a file.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class PixelLimits:
    """Resize limits in pixels, and the frame rate assumed for a video given as a list of frames.

    The defaults are Qwen2.5-VL's: 4 to 16,384 tokens an image; 128 to 768 tokens a frame at 2 frames a second.
    """

    min_pixels: int = 4 * 784
    max_pixels: int = 16384 * 784
    video_min_pixels: int = 128 * 784
    video_max_pixels: int = 768 * 784
    fps: float = 2.0


@dataclasses.dataclass(frozen=True)
class MediaPatches:
    """One image or video, ready for the encoder. n patches, n / merge^2 tokens.

    Attributes:
      patches: uint8 [n, c] in window order.
      frame_ids, window_ids: int32 [n], from 1, contiguous and ascending.
      positions: int32 [n, 2], (h, w) in patches within the frame.
      feature_of_token: int32 [tokens], which feature (in window order) feeds each token (in raster order).
      grid: (t, h, w) in merged units.
      temporal_step: M-RoPE distance between frame pairs (seconds x tokens per second); 0 for an image.
      original, resized: (width, height) in pixels.
    """

    patches: np.ndarray
    frame_ids: np.ndarray
    window_ids: np.ndarray
    positions: np.ndarray
    feature_of_token: np.ndarray
    grid: tuple[int, int, int]
    temporal_step: float
    original: tuple[int, int]
    resized: tuple[int, int]


class Vision(Protocol):
    """The host side of one encoder."""

    def image(self, image: Image.Image, limits: PixelLimits) -> MediaPatches: ...

    def video(self, frames: list[Image.Image], limits: PixelLimits) -> MediaPatches: ...

    @property
    def patch_values(self) -> int: ...

    @property
    def patches_per_feature(self) -> int: ...


_VISIONS: dict[type, Callable[..., Vision]] = {}


def register(config_type: type) -> Callable[[type], type]:
    """Class decorator naming the encoder configuration that a `Vision` serves."""

    def add(vision_type: type) -> type:
        _VISIONS[config_type] = vision_type
        return vision_type

    return add


def vision_for(encoder: object) -> Vision:
    """The host side of an encoder configuration."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    if type(encoder) not in _VISIONS:
        raise TypeError(f"no host-side vision for {type(encoder).__name__}; known: {[t.__name__ for t in _VISIONS]}")
    return _VISIONS[type(encoder)](encoder)

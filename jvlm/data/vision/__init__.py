"""Host side of the vision towers: what each model needs computed from pictures before the device sees them.

One file per way of turning media into frames, with its configuration; each registers itself, so adding one adds a file.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from jvlm.errors import UserError
from jvlm.models.vlm import VLMConfig
from jvlm.validation import check_fields


@dataclasses.dataclass(frozen=True)
class MediaConfig:
    """Base of the configurations that say how media become frames: limits, splitting, marks around features."""


@dataclasses.dataclass(frozen=True)
class PixelLimits(MediaConfig):
    """Qwen's: resize limits in pixels, and the frame rate assumed for a video given as a list of frames.

    The defaults are Qwen2.5-VL's: 4 to 16,384 tokens an image; 128 to 768 tokens a frame at 2 frames a second.

    Attributes:
      resample: Pillow's number of the filter; 3 is bicubic.
      resize: False takes pictures as they are; their sides must then be whole merged patches.
      no_videos: why videos are refused; empty if they are not.
    """

    min_pixels: int = 4 * 784
    max_pixels: int = 16384 * 784
    video_min_pixels: int = 128 * 784
    video_max_pixels: int = 768 * 784
    fps: float = 2.0
    resample: int = Image.Resampling.BICUBIC.value
    resize: bool = True
    no_videos: str = ""

    def __post_init__(self):
        pixels = ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels")
        check_fields(
            self, "processor.media.", {**dict.fromkeys(pixels, "[1, inf)"), "fps": "(0, inf)", "resample": "[0, 5]"}
        )


@dataclasses.dataclass(frozen=True)
class MediaPatches:
    """One image or video, ready for the encoder: n patches in frames, f features, t tokens that features feed.

    Attributes:
      patches: uint8 [n, c] in the order the encoder wants them.
      frame_ids, window_ids: int32 [n], from 1, contiguous and ascending. A tile or crop is a frame.
      positions: int32 [n, 2], (h, w) in patches within the frame, or places of the encoder's position table.
      feature_frames: int32 [f], the frame of each feature, ascending.
      feature_of_token: int32 [t], which feature feeds each of the tokens.
      layout: what stands in the text for the medium: strings, which are tokenized as they are, and numbers, for so many
        of the t tokens; empty is all of them in one run.
      grid: (t, h, w) of one run of tokens, for M-RoPE; None has text's positions.
      temporal_step: M-RoPE distance between frame pairs (seconds x tokens per second); 0 for an image.
      original, resized: (width, height) in pixels; boxes are converted from one to the other.
    """

    patches: np.ndarray
    frame_ids: np.ndarray
    window_ids: np.ndarray
    positions: np.ndarray
    feature_frames: np.ndarray
    feature_of_token: np.ndarray
    original: tuple[int, int]
    resized: tuple[int, int]
    layout: tuple[str | int, ...] = ()
    grid: tuple[int, int, int] | None = None
    temporal_step: float = 0.0

    @property
    def runs(self) -> tuple[str | int, ...]:
        """The layout, written out."""
        return self.layout or (self.feature_of_token.size,)


class Vision(Protocol):
    """The host side of one model, made from it and its media configuration.

    The methods are given a configuration of the same type again, in which a row may have changed limits, not marks.

    Attributes:
      patch_values: values of a flattened patch.
      patch_group: the patches of a row come in multiples of this.
      marks: special tokens that layouts write around features; never generated.
      merged_mark: of two of these side by side one is kept; None if there is no such mark.
    """

    patch_values: int
    patch_group: int
    marks: tuple[str, ...]
    merged_mark: str | None

    def image(self, image: Image.Image, config: MediaConfig, *, index: int, count: int) -> MediaPatches:
        """Image ``index`` (from 0) of the ``count`` images of a conversation."""
        ...

    def video(self, frames: Sequence[Image.Image], config: MediaConfig) -> MediaPatches:
        """A video, as frames of one size."""
        ...

    def max_image_patches(self, config: MediaConfig) -> int | None:
        """Most patches that a frame of any picture gets; None if there is no limit."""
        ...

    def smaller(self, config: MediaConfig) -> Sequence[Sequence[dict[str, Any]]]:
        """Ways to make pictures cost less, the mildest way first: each a list of changed fields, from a little to most.

        Along a list tokens and patches never grow.
        """
        ...


_VISIONS: dict[type, Callable[[VLMConfig, MediaConfig], Vision]] = {}
_DEFAULTS: dict[str, type] = {}


def register(media: type, *architectures: str) -> Callable[[type], type]:
    """Class decorator: the `Vision` of a media configuration, which is the default one of these architectures."""

    def add(vision_type: type) -> type:
        _VISIONS[media] = vision_type
        _DEFAULTS.update(dict.fromkeys(architectures, media))
        return vision_type

    return add


def _load_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def media_type(name: str) -> type:
    """The media configuration of a name, as stored with a processor."""
    _load_all()
    known = {t.__name__: t for t in _VISIONS}
    if name not in known:
        raise UserError(f"unknown configuration {name!r}; known: {sorted(known)}")
    return known[name]


def default_media(model: VLMConfig) -> MediaConfig:
    """The media configuration of a model that brings none. Raises KeyError naming the architectures that have one."""
    _load_all()
    if model.architecture not in _DEFAULTS:
        raise KeyError(f"no media configuration for {model.architecture!r}; known: {', '.join(_DEFAULTS)}")
    return _DEFAULTS[model.architecture]()


def vision_for(model: VLMConfig, config: MediaConfig) -> Vision:
    """The host side of a model."""
    _load_all()
    return _VISIONS[type(config)](model, config)

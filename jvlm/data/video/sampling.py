"""Which frames of a video are sampled, and how large each may be.

The rule "numbers" is that of qwen-vl-utils 0.0.14, by which Qwen2.5-VL and MiMo-VL see videos; the rule "times" is for
videos whose frames are not equally far apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

from jvlm.data.smart_resize import MAX_ASPECT
from jvlm.errors import UserError

Rule = Literal["auto", "numbers", "times"]
# (frames, width, height) -> (width, height) of each frame
SizeRule = Callable[[int, int, int], tuple[int, int]]
FRAMES_PER_PATCH = 2  # frames of a temporal patch
PATCH_AREA = 28 * 28  # pixels that one token stands for
_UNEVEN = 1.5  # the largest distance between frames over the median one, above which "auto" goes by times
_SAME_TIME = 1e-6  # s; times are exact fractions until they become floats


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which frames to take.

    Attributes:
      fps: frames a second.
      num_frames: so many frames, however long the video is, instead of ``fps``; rounded to an even number.
      min_frames, max_frames: limits on the number that ``fps`` gives.
      start, end: part of the video in seconds; None is its beginning, its end.
      rule: "numbers" spaces frames equally by their numbers, from the first to the last one. "times" takes the frame
        that is shown at each multiple of 1 / fps. "auto" is "times" where the distance between two frames is over 1.5
        times the median distance, otherwise "numbers".
      pairs: take an even number of frames, as qwen-vl-utils does. False takes any number, and computes theirs in
        float64, as transformers' processor of Qwen3-VL's videos does.
    """

    fps: float = 2.0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    start: float | None = None
    end: float | None = None
    rule: Rule = "auto"
    pairs: bool = True

    def __post_init__(self):
        for name in ("fps", "num_frames", "min_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"video sampling: {name} is {value}. Give a number above 0")
        if self.min_frames > self.max_frames:
            raise UserError(
                f"video sampling: min_frames {self.min_frames} exceeds max_frames {self.max_frames}. Change one"
            )
        for name in ("start", "end"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"video sampling: {name} is {value}. Give seconds from the video's first frame")
        if self.rule not in get_args(Rule):
            raise UserError(f"video sampling: rule {self.rule!r} is unknown. Use one of {', '.join(get_args(Rule))}")

    def by_number(self, total: int, fps: float) -> SampledIndices:
        """Return `by_number` of these settings; a family whose models see other frames has its own."""
        return by_number(total, fps, self)


@dataclasses.dataclass(frozen=True)
class SampledIndices:
    """The frames that a rule takes.

    Attributes:
      indices: number of each frame in order of presentation, from 0, ascending; "times" may repeat one.
      fps: sampled frames a second, from which M-RoPE's ids are computed.
    """

    indices: tuple[int, ...]
    fps: float

    @property
    def seconds_per_patch(self) -> float:
        """Seconds from one temporal patch to the next (``second_per_grid_ts`` of transformers)."""
        return FRAMES_PER_PATCH / self.fps


def sample(times: Sequence[float], duration: float, sampling: Sampling) -> SampledIndices:
    """Return the frames to take of a video.

    Args:
      times: when each frame is shown, in seconds from the first one, ascending.
      duration: seconds from the first frame to the end of the last one.
      sampling: how to take them.

    Raises:
      UserError: a video too short, or without the part that is asked for.
    """
    if not times or not duration > 0:
        raise UserError(f"a video of {len(times)} frames and {duration:g} s. Remove it")
    rule = sampling.rule
    if rule == "auto":
        rule = "times" if is_uneven(times) else "numbers"
    if rule == "times":
        return by_times(times, duration, sampling)
    return sampling.by_number(len(times), len(times) / duration)


def is_uneven(times: Sequence[float]) -> bool:
    """Return whether the largest distance between frames is over 1.5 times the median distance."""
    gaps = np.diff(np.asarray(times, np.float64))
    return gaps.size > 0 and bool(gaps.max() > _UNEVEN * np.median(gaps) + _SAME_TIME)


def by_number(total: int, fps: float, sampling: Sampling) -> SampledIndices:
    """Return frames equally spaced by their numbers, as qwen-vl-utils 0.0.14 takes them.

    The last one is always among them, so that they lie a little further apart than ``1 / fps`` of the result says.

    Args:
      total: frames of the video that can be decoded.
      fps: ``total`` over the video's duration.
      sampling: how to take them.

    Raises:
      UserError: fewer than two frames, or an empty part.
    """
    first, last = _range(total, fps, sampling)
    total = last - first + 1
    count = _count(total / fps, sampling, total)
    if not FRAMES_PER_PATCH <= count <= total:
        raise UserError(
            f"{count} of {total} frames are to be sampled, at least {FRAMES_PER_PATCH} and at most all are possible. "
            "Change fps or num_frames, or take a longer part"
        )
    chosen = _rounded_linspace(first, last, count) if sampling.pairs else np.linspace(first, last, count).round()
    return SampledIndices(tuple(int(i) for i in chosen), count / total * fps)


def by_times(times: Sequence[float], duration: float, sampling: Sampling) -> SampledIndices:
    """Return the frames that are shown at equal distances in time: each the last one that has begun.

    The distance is 1 / ``sampling.fps``, or the duration over the number of frames where that number is given or at
    one of its limits. A frame that is shown for longer is taken more than once. Arguments and errors are as of
    `sample`.
    """
    start = min(sampling.start or 0.0, duration)
    end = duration if sampling.end is None else min(sampling.end, duration)
    if not start < end:
        raise UserError(_no_part(start, end, duration))
    span = end - start
    count = _count(span, sampling, None)
    lowest, highest = _limits(sampling)
    is_free = sampling.num_frames is None and lowest <= span * sampling.fps <= highest
    step = 1 / sampling.fps if is_free else span / count
    shown = start + np.arange(count) * step + _SAME_TIME
    indices = np.searchsorted(np.asarray(times, np.float64), shown, side="right") - 1
    return SampledIndices(tuple(int(i) for i in np.maximum(indices, 0)), 1 / step)


def _range(total: int, fps: float, sampling: Sampling) -> tuple[int, int]:
    """(first, last) frame of the part of the video."""
    duration = total / fps
    first, last = 0, total - 1
    if sampling.start is None and sampling.end is None:
        return first, last
    if sampling.start is not None:
        first = math.ceil(min(sampling.start, duration) * fps)
    if sampling.end is not None:
        last = min(math.floor(min(sampling.end, duration) * fps), last)
    if first >= last:
        raise UserError(_no_part(sampling.start or 0.0, duration if sampling.end is None else sampling.end, duration))
    return first, last


def _no_part(start: float, end: float, duration: float) -> str:
    return f"no two frames from {start:g} s to {end:g} s of a video of {duration:g} s. Correct start and end"


def _limits(sampling: Sampling) -> tuple[int, int]:
    """Fewest and most frames, as even numbers where pairs are taken."""
    step = FRAMES_PER_PATCH if sampling.pairs else 1
    return math.ceil(sampling.min_frames / step) * step, sampling.max_frames // step * step


def _count(seconds: float, sampling: Sampling, total: int | None) -> int:
    """How many frames to sample in so many seconds, of ``total`` frames."""
    step = FRAMES_PER_PATCH if sampling.pairs else 1
    if sampling.num_frames is not None:
        return max(round(sampling.num_frames / step), 1) * step
    lowest, highest = _limits(sampling)
    count = min(max(seconds * sampling.fps, lowest), highest, math.inf if total is None else total)
    return int(count // step) * step


def _rounded_linspace(first: int, last: int, count: int) -> list[int]:
    """``torch.linspace(first, last, count).round()``, whose float32 decides where a value is near a half."""
    step = np.float32(last - first) / np.float32(count - 1)
    number = np.arange(count)
    # the product is exact in float64: torch multiplies and adds with one rounding
    below = np.float32(first + np.float64(step) * number)
    above = np.float32(last - np.float64(step) * (count - 1 - number))
    return np.where(number < count // 2, below, above).round().astype(int).tolist()


@dataclasses.dataclass(frozen=True)
class FramePixels:
    """How many pixels a frame may have, by the number of frames.

    Attributes:
      min_pixels: fewest of a frame.
      max_pixels: most of a frame; None is 768 tokens' worth.
      total_pixels: for a whole video, of which a pair of frames counts as one; 90 % of 128,000 tokens' worth.
      is_hard: keep to ``total_pixels`` however many frames there are; where enlarging to ``min_pixels`` could exceed
        them, no frame is enlarged. qwen-vl-utils gives each frame 1.05 times ``min_pixels`` all the same, so that long
        videos exceed ``total_pixels``.
    """

    min_pixels: int = 128 * PATCH_AREA
    max_pixels: int | None = None
    total_pixels: float = 0.9 * 128_000 * PATCH_AREA
    is_hard: bool = False

    def limits(self, frames: int) -> tuple[int, float]:
        """Return (fewest, most) pixels of each of so many frames; fewest above most where the settings disagree."""
        share = self.total_pixels / frames * FRAMES_PER_PATCH
        most = min(768 * PATCH_AREA, share)
        if not self.is_hard:
            most = max(most, int(self.min_pixels * 1.05))
        if self.max_pixels is not None:
            most = min(self.max_pixels, most)
        if self.is_hard and _largest_enlarged(self.min_pixels) > most:
            return PATCH_AREA, most
        return self.min_pixels, most


def _largest_enlarged(pixels: int) -> float:
    """Most pixels of a frame enlarged to ``pixels``, each side then rounded up to whole patches."""
    sides = math.sqrt(pixels) * (math.sqrt(MAX_ASPECT) + 1 / math.sqrt(MAX_ASPECT))
    return pixels + sides * math.sqrt(PATCH_AREA) + PATCH_AREA

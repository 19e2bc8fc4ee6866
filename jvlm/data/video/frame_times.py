"""The times of a video's frames as words between its frames, as Qwen3-VL has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jvlm.data.image_processor import MediaPatches


def with_times(
    media: MediaPatches, times: Sequence[float] | None, *, frames: int, fps: float, pair: int, start: str, end: str
) -> MediaPatches:
    """Return a video in which each temporal patch is an image of its own, behind "<1.2 seconds>".

    The time is the mean of those of the patch's first and last frame; an incomplete last patch repeats the last frame.

    Args:
      media: of the whole video, whose runs of tokens are all of one size.
      times: of each frame, in seconds; None takes them to be 1 / ``fps`` apart.
      frames, fps: how many, and how many a second.
      pair: frames of a temporal patch.
      start, end: special tokens around an image.
    """
    patches = int(media.segment_ids[-1])
    if times is None:
        times = [number / fps for number in range(frames)]
    padded = [*times, *[times[-1]] * (-len(times) % pair)]
    shown = [f"<{(padded[i] + padded[i + pair - 1]) / 2:.1f} seconds>" for i in range(0, patches * pair, pair)]
    run = media.vision_index.size // patches
    between = (piece for time in shown[1:] for piece in (f"{end}{time}{start}", run))
    grid = None if media.grid is None else (1, *media.grid[1:])
    return dataclasses.replace(
        media, token_pattern=(run, *between), leading_text=shown[0], grid=grid, temporal_step=0.0
    )

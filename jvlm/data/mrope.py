"""M-RoPE position ids as the released weights were trained with them (transformers 4.49 and 4.51).

Later versions of transformers compute other ids for videos; see docs/mrope.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class MediaSpan:
    """Place of one image or video in a conversation: first token, grid (t, h, w) in tokens, temporal step."""

    start: int
    grid: tuple[int, int, int]
    temporal_step: float


def mrope_positions(length: int, spans: Sequence[MediaSpan]) -> Int[np.ndarray, "S 3"]:
    """(t, h, w) ids of every token, int32 [length, 3].

    Text advances all three ids together. Media start at the next id: t grows by ``floor(frame x temporal_step)``
    and h, w count the grid; the text after continues above the largest id used.

    Args:
      spans: in order of position, not overlapping.
    """
    ids = np.empty((length, 3), np.int32)
    at, following = 0, 0
    for span in spans:
        text = span.start - at
        ids[at : span.start] = (following + np.arange(text))[:, None]
        following += text
        grid = _grid(*span.grid, span.temporal_step)
        np.add(grid, following, out=ids[span.start : span.start + len(grid)])
        following += int(grid.max()) + 1
        at = span.start + len(grid)
    ids[at:] = (following + np.arange(length - at))[:, None]
    return ids


@functools.lru_cache(maxsize=128)
def _grid(t: int, h: int, w: int, temporal_step: float) -> Int[np.ndarray, "n 3"]:
    """Return the ids of an image or video, from 0. The array cannot be written."""
    # float32 as in the reference: the floor of a product is sensitive to it
    times = np.floor(np.arange(t, dtype=np.float32) * np.float32(temporal_step)).astype(np.int32)
    grid = np.stack(np.meshgrid(times, np.arange(h), np.arange(w), indexing="ij"), -1).reshape(-1, 3).astype(np.int32)
    grid.setflags(write=False)
    return grid

"""Frames of a video that lie far apart, without decoding all that is between: from the last keyframe before each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

_NEAR = 8  # frames that are decoded rather than skipped by a seek
_WORTH = 0.8  # share of the frames that are to be decoded, above which all are


class Stretch(NamedTuple):
    """Frames decoded one after the other: from a keyframe to the last one wanted.

    Attributes:
      keyframe: number of the first.
      wanted: numbers of those that are kept, ascending.
    """

    keyframe: int
    wanted: list[int]


def stretches(indices: Sequence[int], keyframes: Sequence[int]) -> list[Stretch]:
    """Return what has to be decoded; nothing where that would be about as much as everything up to the last frame.

    Args:
      indices: frames wanted, ascending; repeats allowed.
      keyframes: ascending; empty where they are not known.
    """
    if not keyframes or keyframes[0] != 0:
        return []
    found: list[Stretch] = []
    for number in dict.fromkeys(indices):
        keyframe = keyframes[int(np.searchsorted(keyframes, number, "right")) - 1]
        if found and keyframe - found[-1].wanted[-1] <= _NEAR:
            found[-1].wanted.append(number)
        else:
            found.append(Stretch(keyframe, [number]))
    decoded = sum(one.wanted[-1] - one.keyframe + _NEAR for one in found)
    return found if decoded < _WORTH * (indices[-1] + 1) else []


def frames(
    container: Any, stream: Any, pts: Sequence[int], parts: Sequence[Stretch], keep: Callable[[Any], np.ndarray]
) -> dict[int, np.ndarray] | None:
    """Return the wanted frames by number, the same as decoding from the beginning gives.

    Returns None where that cannot be said: the decoder does not give the keyframe, gives frames that are not those of
    the packets, or meets an error. Frames before the keyframe, as an open group has them, are not looked at.

    Args:
      container, stream: of PyAV.
      pts: time of each frame, ascending, all different.
      keep: makes pixels of a frame.
    """
    import av

    number_of = {time: number for number, time in enumerate(pts)}
    kept: dict[int, np.ndarray] = {}
    try:
        for part in parts:
            container.seek(pts[part.keyframe], stream=stream)
            expected = part.keyframe
            for frame in container.decode(stream):
                number = number_of.get(frame.pts, -1)
                if number < part.keyframe:
                    continue
                # intra refresh marks frames at which decoding becomes right only some frames later
                is_begin = frame.key_frame and frame.pict_type == av.video.frame.PictureType.I
                if number != expected or frame.is_corrupt or (number == part.keyframe and not is_begin):
                    return None
                expected += 1
                if number in part.wanted:
                    kept[number] = keep(frame)
                if number == part.wanted[-1]:
                    break
            else:
                return None
    except av.error.FFmpegError:  # said by who decodes everything
        return None
    return kept

"""Sampled frames of video files, decoded in processes that are killed when they take too long or crash."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
from jaxtyping import UInt8

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.images import find_file
from jvlm.data.video import decoding
from jvlm.data.video.config import OnDamaged, VideoConfig
from jvlm.data.video.decoding import Decoded, Timeline
from jvlm.data.video.sampling import FRAMES_PER_PATCH, Sampling, SizeRule, sample
from jvlm.errors import UserError
from jvlm.killable_pool import KillablePool

_LEAST_SHARE = 0.9  # of a damaged video's duration that must be readable
_TASKS = 200  # of a process, after which it is replaced
_LOCK = threading.Lock()
_FIX = "Repair the file, or leave the example out"


@dataclasses.dataclass(frozen=True)
class VideoFrames:
    """The sampled frames of a video.

    Attributes:
      frames: RGB.
      times: when each is shown, in seconds from the video's first frame.
      duration: of the video in seconds.
      fps: sampled frames a second, from which M-RoPE's ids are computed.
      share: of the duration that could be read: 1 unless the file is damaged.
    """

    frames: UInt8[np.ndarray, "n h w 3"]
    times: tuple[float, ...]
    duration: float
    fps: float
    share: float = 1.0

    @property
    def seconds_per_patch(self) -> float:
        """Seconds from one temporal patch to the next (``second_per_grid_ts`` of transformers)."""
        return FRAMES_PER_PATCH / self.fps


class VideoSupportError(UserError):
    """No video can be decoded in this installation or process, whatever the example."""


class VideoReader(KillablePool):
    """Reads videos. Use it as a context manager, or call `close`.

    Args:
      workers: processes that decode.
      seconds, seconds_per_second: the time that a video may take, and how much more for each second of it, or for each
        frame where they are fewer. Afterwards its process is killed and another started.
      on_damaged: "error" refuses a video with an error in it, "keep" takes what comes before the error if that is
        90 % of the duration.
      begin: called in each process as it begins; it ends by calling `decoding.begin`, or does what that does.

    Raises:
      VideoSupportError: PyAV or pebble is not installed; this process may start no others.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        seconds: float = 30.0,
        seconds_per_second: float = 2.0,
        on_damaged: OnDamaged = "error",
        begin: Callable[[], None] = decoding.begin,
    ):
        if on_damaged not in get_args(OnDamaged):
            raise UserError(f"on_damaged {on_damaged!r} is unknown. Use one of {', '.join(get_args(OnDamaged))}")
        if multiprocessing.current_process().daemon:
            raise VideoSupportError(
                "videos are decoded in processes, which a worker process cannot start. Set data.worker_processes 0"
            )
        pebble = _required("pebble")
        _required("av")
        super().__init__(pebble, workers, _TASKS, begin)
        self.seconds, self.seconds_per_second, self.on_damaged = seconds, seconds_per_second, on_damaged

    def read(
        self,
        source: str | Path | bytes,
        sampling: Sampling = Sampling(),
        *,
        size: SizeRule | None = None,
        origin: Origin = Origin(),
        field: str = "videos",
        roots: tuple[str, ...] = (),
        name: str = "",
    ) -> VideoFrames:
        """Return the sampled frames of a video, or of an animated GIF, WebP or PNG.

        Rotation is applied; pixels that are not square stay as they are, as Qwen leaves them.

        Args:
          source: a path, looked up in ``roots`` where it is relative; or the contents of a file.
          sampling: which frames.
          size: what each frame is resized to at once: a function of (frames, width, height) that can be pickled and
            returns (width, height); None keeps the size.
          origin, field, roots: as of `jvlm.data.images.open_image`.
          name: of the file whose contents are given, for errors.

        Raises:
          ExampleError: not found, not a video, damaged, too short, or too slow to decode.
        """
        if not isinstance(source, bytes):
            source = find_file(str(source), roots, origin, field)
        shown = f"the video {(name if isinstance(source, bytes) else str(source))[:200]}".rstrip()
        try:
            return self._read(source, sampling, size)
        except UserError as error:
            raise ExampleError(origin, field, f"{shown} cannot be used: {error}", _FIX) from error

    def _read(self, source: Path | bytes, sampling: Sampling, size: SizeRule | None) -> VideoFrames:
        times: Timeline = self._call(self.seconds, decoding.timeline, source)
        # times far apart must not make the limit endless
        seconds = self.seconds + self.seconds_per_second * min(times.duration, len(times.times))
        share, error = 1.0, times.error
        if error:
            share = self._share(times.duration, max(times.duration, times.header_seconds), error)
        for _ in range(2):
            chosen = sample(times.times, times.duration, sampling)
            decoded: Decoded = self._call(seconds, decoding.decode, source, times, chosen.indices, size, bool(error))
            if decoded.error:
                error = error or decoded.error
                readable = _before(times, decoded.count)
                share = self._share(readable.duration, times.duration / share, error)
                times = readable
            elif decoded.timeline is not None:
                times = decoded.timeline
            else:
                shown = tuple(times.times[i] for i in chosen.indices)
                return VideoFrames(decoded.frames, shown, times.duration, chosen.fps, share)
        raise UserError(error or "its decoder gives another number of frames each time")

    def _share(self, duration: float, whole: float, error: str) -> float:
        """Return the share of a damaged video that can be read. Raises UserError if it is not to be used."""
        read = f"{duration:.2f} of {whole:.2f} s can be read, then: {error}"
        if self.on_damaged == "error":
            raise UserError(read)
        share = duration / whole if whole else 0.0
        if share < _LEAST_SHARE:
            raise UserError(f"{read}; at least {_LEAST_SHARE:.0%} must be readable")
        return share

    def _call(self, seconds: float, task: Callable, *arguments: Any) -> Any:
        """Return the result of a task in a process. Raises UserError where it does not come to an end."""
        try:
            return self._pool.schedule(task, args=arguments, timeout=seconds).result()
        except BrokenProcessPool as error:
            raise VideoSupportError(
                "the processes that decode videos do not start. In a script of your own, put what it does under "
                "if __name__ == '__main__'"
            ) from error
        except concurrent.futures.TimeoutError as error:
            raise UserError(f"decoding took longer than {seconds:g} s") from error
        except self._expired as error:
            raise UserError(f"decoding crashed ({error})") from error


def _before(times: Timeline, count: int) -> Timeline:
    """Return the timeline of the frames before an error."""
    duration = times.times[count] if count < len(times.times) else times.duration
    return Timeline(times.times[:count], duration)


@functools.cache
def _reader_of(pid: int, config: VideoConfig) -> VideoReader:
    return VideoReader(
        min(config.processes, os.cpu_count() or 1),
        seconds=config.seconds,
        seconds_per_second=config.seconds_per_second,
        on_damaged=config.on_damaged,
    )


def shared_reader(config: VideoConfig = VideoConfig()) -> VideoReader:
    """Return the reader that everything in this process with these settings shares. Raises VideoSupportError."""
    with _LOCK:
        return _reader_of(os.getpid(), config)  # a forked process has none of its parent's processes


def _required(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise VideoSupportError(f"videos need {name}: pip install 'jvlm[video]'") from error

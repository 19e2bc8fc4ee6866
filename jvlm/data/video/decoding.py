"""What the processes of `jvlm.data.video.reader` run: PyAV for videos, Pillow for animated images.

Nothing that a file's header says of frame rates and counts is believed: the times of the packets are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jvlm.data.pixels import image_to_rgb
from jvlm.data.video import seeking
from jvlm.data.video.sampling import SizeRule
from jvlm.errors import UserError

_UNTIMED_MS = 100  # a frame of an animation that is to be shown for 0 ms is shown for so long, as browsers do


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When the frames of a file are shown.

    Attributes:
      times: seconds from the first frame, ascending.
      duration: seconds from the first frame to the end of the last one.
      error: why no more could be read; empty where all was.
      header_seconds: duration that the file says it has; 0 where it says none. It only tells how much an error cut off.
      pts: the times in units of the stream, by which a frame is found after a seek; empty where none can be.
      keyframes: numbers of the frames at which decoding can begin.
    """

    times: tuple[float, ...]
    duration: float
    error: str = ""
    header_seconds: float = 0.0
    pts: tuple[int, ...] = ()
    keyframes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Frames of a file.

    Attributes:
      frames: RGB, those of the indices asked for; fewer after an error.
      timeline: of the frames that the decoder gave, where they are not those of the packets; else None.
      count: frames decoded, sampled or not.
      error: the first error of the decoder; empty where there was none.
    """

    frames: UInt8[np.ndarray, "n h w 3"]
    timeline: Timeline | None
    count: int
    error: str = ""


def begin() -> None:
    """Load PyAV and keep its log off: from several threads it can wait for itself."""
    import av

    av.logging.set_level(None)


def timeline(source: Path | bytes) -> Timeline:
    """Return when the frames of a file are shown. Raises UserError where it has none."""
    if _is_animation(source):
        return _animation_timeline(source)
    import av

    with _video(source) as (container, stream):
        pts, keys, last, length, error, is_plain = [], [], None, 0, "", True
        try:
            for packet in container.demux(stream):
                time = packet.dts if packet.pts is None else packet.pts
                if packet.is_corrupt:
                    error = "the file ends within a frame, or a frame is damaged"
                    break
                # what is not shown, or has no time of its own, cannot be found again after a seek
                is_plain = is_plain and not (packet.size and (packet.is_discard or packet.pts is None))
                if not packet.size or packet.is_discard or time is None:
                    continue
                if packet.is_keyframe:
                    keys.append(time)
                if last is None or time > last:
                    last, length = time, packet.duration or 0
                pts.append(time)
        except av.error.FFmpegError as raised:
            error = _said(raised)
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = (container.duration or 0) / av.time_base
        found = _timeline(pts, length, stream.time_base, error, seconds)
        if is_plain and not error and len(set(pts)) == len(pts):
            ordered = sorted(pts)
            numbers = np.searchsorted(ordered, sorted(keys))
            found = dataclasses.replace(found, pts=tuple(ordered), keyframes=tuple(numbers.tolist()))
    if not found.times:
        raise UserError(error or "it has no frames with times")
    return found


def decode(
    source: Path | bytes, times: Timeline, indices: tuple[int, ...], size: SizeRule | None, is_damaged: bool = False
) -> Decoded:
    """Return frames of a file; of the others none is kept, and those are not decoded that keyframes let it skip.

    Args:
      source: a file, or its contents.
      times: of its frames.
      indices: which, ascending; repeats allowed.
      size: what to resize each to at once; None keeps the size.
      is_damaged: after the last of the frames come errors, which are known.

    Raises:
      UserError: not one of them can be decoded.
    """
    if _is_animation(source):
        return _decode_animation(source, indices, size)
    import av

    stretches = [] if is_damaged else seeking.stretches(indices, times.keyframes)
    if stretches:
        keep = lambda frame: _resized(_upright(frame), len(indices), size)  # noqa: E731
        with _video(source) as (container, stream):
            found = seeking.frames(container, stream, times.pts, stretches, keep)
        if found is not None:
            return Decoded(_stacked([found[i] for i in indices]), None, len(found))
    wanted, kept, pts = set(indices), {}, []
    error, is_expected, is_whole = "", True, True
    with _video(source) as (container, stream):
        base = stream.time_base
        try:
            for frame in container.decode(stream):
                number = len(pts)
                pts.append(frame.pts)
                # frames come in order of presentation, but their times do not in some files
                is_expected = is_expected and _is_at(frame.pts, pts[0], base, times, number)
                if number in wanted:
                    kept[number] = _resized(_upright(frame), len(indices), size)
                if number == indices[-1] and (is_expected or is_damaged):
                    is_whole = False
                    break
        except av.error.FFmpegError as raised:
            error = _said(raised)
    if not kept:
        raise UserError(error or f"{len(times.times)} frames, none of which can be decoded")
    own = None
    if not error and is_whole and len(pts) != len(times.times):
        own = _timeline(_rising(pts), 0, base)
    return Decoded(_stacked([kept[i] for i in indices if i in kept]), own, len(pts), error)


@contextlib.contextmanager
def _video(source: Path | bytes) -> Iterator[tuple]:
    """(container, stream) of the first video that is not a cover image. Raises UserError."""
    import av

    with contextlib.ExitStack() as stack:
        try:
            # no protocol: playlists must not make FFmpeg open files and URLs
            file = stack.enter_context(io.BytesIO(source) if isinstance(source, bytes) else source.open("rb"))
            if not file.seek(0, os.SEEK_END):
                raise UserError("it is empty, 0 bytes")
            file.seek(0)
            container = stack.enter_context(av.open(file, options={"protocol_whitelist": "none"}))
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(_said(error)) from error
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise UserError("it has no video")
        if streams[0].codec_context is None:
            raise UserError("its video is of a kind that the FFmpeg in PyAV does not decode")
        streams[0].codec_context.thread_count = 1  # several can wait for each other for ever
        yield container, streams[0]


def _said(error: OSError) -> str:
    """Return what FFmpeg or the system says, without the number of the error and the name of the file."""
    return error.strerror or str(error)


def _timeline(pts: list[int], length: int, base, error: str = "", header_seconds: float = 0.0) -> Timeline:
    """Return a timeline of times in units of ``base``; ``length`` is that of the last frame, 0 where it is unknown."""
    pts = sorted(pts)
    if not pts:
        return Timeline((), 0.0, error, header_seconds)
    if length <= 0:
        length = int(np.median(np.diff(pts))) if len(pts) > 1 else 0
    times = tuple(float((t - pts[0]) * base) for t in pts)
    return Timeline(times, float((pts[-1] - pts[0] + length) * base), error, header_seconds)


def _is_at(pts: int | None, first: int | None, base, times: Timeline, number: int) -> bool:
    """Whether a frame has the time of the packet of the same number."""
    if pts is None or first is None or number >= len(times.times):
        return False
    return abs(float((pts - first) * base) - times.times[number]) < 1e-6


def _rising(pts: list[int | None]) -> list[int]:
    """Return the times of frames, where one is unknown or not after the last one a unit after it."""
    rising: list[int] = []
    for time in pts:
        least = rising[-1] + 1 if rising else None
        rising.append((least or 0) if time is None else time if least is None else max(time, least))
    return rising


def _upright(frame) -> Image.Image:
    """Return a frame in RGB, rotated as its file says."""
    try:
        pixels = frame.to_ndarray(format="rgb24")
    except ValueError as error:
        raise UserError(f"frames of the format {frame.format.name}, which cannot be made RGB ({error})") from error
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)))


def _resized(image: Image.Image, frames: int, size: SizeRule | None) -> np.ndarray:
    if size is not None:
        target = size(frames, *image.size)
        if target != image.size:
            image = image.resize(target, Image.Resampling.BICUBIC)
    return np.asarray(image)


def _stacked(frames: list[np.ndarray]) -> np.ndarray:
    sizes = sorted({(frame.shape[1], frame.shape[0]) for frame in frames})
    if len(sizes) > 1:
        raise UserError(f"frames of different sizes {sizes}")
    return np.stack(frames)


def _is_animation(source: Path | bytes) -> bool:
    """Whether a file is an image, by its first bytes: FFmpeg reads only some animations."""
    try:
        head = source[:12] if isinstance(source, bytes) else _head(source)
    except OSError as error:
        raise UserError(_said(error)) from error
    return head.startswith((b"GIF8", b"\x89PNG\r\n")) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(12)


@contextlib.contextmanager
def _animation(source: Path | bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{error}") from error


def _animation_timeline(source: Path | bytes) -> Timeline:
    times, now = [], 0
    with _animation(source) as image:
        count = getattr(image, "n_frames", 1)
        if count < 2:
            raise UserError("it is a still image. Images go to images, the frames of one video into a list in videos")
        for number in range(count):
            image.seek(number)
            image.load()  # WebP's durations are known afterwards
            times.append(now / 1000)
            now += image.info.get("duration", 0) or _UNTIMED_MS
    return Timeline(tuple(times), now / 1000)


def _decode_animation(source: Path | bytes, indices: tuple[int, ...], size: SizeRule | None) -> Decoded:
    kept = {}
    with _animation(source) as image:
        for number in range(indices[-1] + 1):
            image.seek(number)
            if number in indices:
                kept[number] = _resized(image_to_rgb(image), len(indices), size)
    return Decoded(_stacked([kept[i] for i in indices]), None, indices[-1] + 1)

"""Images and videos of a request: where from, how many, how large; decoded in processes of their own.

Nothing that a request names reaches `jvlm.data.images.open_image` as a string: what is allowed becomes bytes here, and
bytes become pixels in a process with limits.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import concurrent.futures
import dataclasses
import functools
import importlib
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, Literal

import PIL.Image

from jvlm.data.content import Image, Video
from jvlm.data.errors import ExampleError
from jvlm.data.image_processor import ImageProcessorConfig
from jvlm.data.processor import Processor
from jvlm.data.video.reader import VideoFrames, VideoReader, VideoSupportError
from jvlm.errors import UserError
from jvlm.killable_pool import KillablePool
from jvlm.server import decode
from jvlm.server.errors import APIError, bad
from jvlm.server.fetch import Fetcher, FetchError, SlowHost
from jvlm.server.local_files import FileRefused, read_below
from jvlm.server.settings import MediaRules

_TASKS = 200  # of a decoding process, after which it is replaced
_LOW_DETAIL = 512 * 512
_THREADS = 8
_FRAMES_HEAD = "data:video/jpeg;base64,"


@dataclasses.dataclass(frozen=True)
class MediaSource:
    """An image or video that a request names.

    Attributes:
      value: a URL, a path, or bare base64 where ``bare``; checked by nobody yet.
      field: where it stands in the body.
      detail: of an image, as in OpenAI's API.
      bare: plain base64 is taken for contents.
      sampling: fields of `jvlm.data.video.sampling.Sampling` that the request sets.
    """

    kind: Literal["image", "video"]
    value: str
    field: str
    detail: str = "auto"
    bare: bool = False
    sampling: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass
class MediaTimes:
    """What reading media took.

    Attributes:
      fetch, decode: seconds.
      bytes: of all of them, as they came.
    """

    fetch: float = 0.0
    decode: float = 0.0
    bytes: int = 0


def check_counts(sources: Sequence[MediaSource], rules: MediaRules) -> None:
    """Raise APIError for more images or videos than allowed, before one byte of them is read."""
    for kind, most in (("image", rules.images), ("video", rules.videos)):
        count = sum(source.kind == kind for source in sources)
        if count > most:
            raise bad(f"{count} {kind}s in a request; at most {most} are allowed", "messages")


class MediaLoader:
    """Reads and decodes. Call `close` at the end.

    Args:
      fetcher: reads URLs; None makes one by the rules.
    """

    def __init__(self, rules: MediaRules, processor: Processor, fetcher: Fetcher | None = None):
        self.rules, self._processor = rules, processor
        self._fetcher = fetcher or Fetcher(rules)
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="jvlm-media")
        self._decoders: _Decoders | None = None
        self._videos: VideoReader | None = None

    def close(self) -> None:
        """Stop the processes and threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for pool in (self._decoders, self._videos):
            if pool is not None:
                pool.close()

    async def load(
        self, sources: Sequence[MediaSource], config: ImageProcessorConfig, times: MediaTimes
    ) -> list[Image | Video]:
        """Return the parts of a conversation for what a request names, numbered by kind.

        Raises:
          APIError: not allowed, not there, too many, too large, or damaged; names the field only.
        """
        check_counts(sources, self.rules)
        began = time.monotonic()
        contents = await asyncio.gather(*(self._content(source) for source in sources))
        times.fetch = time.monotonic() - began
        times.bytes = sum(len(content) for frames in contents for content in frames)
        began = time.monotonic()
        parts, numbers, pixels = [], {"image": 0, "video": 0}, 0
        for source, content in zip(sources, contents, strict=True):
            index = numbers[source.kind]
            numbers[source.kind] += 1
            part, size = await self._part(source, content, index, config, self.rules.request_pixels - pixels)
            pixels += size
            parts.append(part)
        times.decode = time.monotonic() - began
        return parts

    async def _content(self, source: MediaSource) -> list[bytes]:
        """Return the bytes of an image or video file, or of each frame of a list."""
        value = source.value
        if value[:5].lower() == "data:":
            if source.kind == "video" and value[: len(_FRAMES_HEAD)].lower() == _FRAMES_HEAD:
                encoded = value[len(_FRAMES_HEAD) :]
                if encoded.count(",") >= self.rules.frames:
                    raise bad(f"more than {self.rules.frames} frames", source.field)
                return [self._decoded(frame, source) for frame in encoded.split(",")]
            return [self._data_url(value, source)]
        if value[:7].lower() == "http://" or value[:8].lower() == "https://":
            return [await self._in_thread(functools.partial(self._fetched, source))]
        if source.bare and not value.startswith(("/", "file:")) and len(value) > 64:
            content = _from_base64(value)
            if content is not None:
                return [self._of_size(content, source)]
        return [await self._in_thread(functools.partial(self._file, source))]

    async def _in_thread(self, task: Callable[[], bytes]) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._threads, task)

    def _data_url(self, value: str, source: MediaSource) -> bytes:
        head, comma, body = value.partition(",")
        if not comma or not head.lower().rstrip().endswith(";base64"):
            raise bad("a data: URL must be base64", source.field)
        return self._decoded(urllib.parse.unquote(body) if "%" in body else body, source)

    def _decoded(self, text: str, source: MediaSource) -> bytes:
        if len(text) > self.rules.fetch_bytes * 3 // 2:
            raise bad(f"more than {self.rules.fetch_bytes} bytes", source.field)
        content = _from_base64(text)
        if not content:
            raise bad("the data: URL is empty or not base64", source.field)
        return self._of_size(content, source)

    def _of_size(self, content: bytes, source: MediaSource) -> bytes:
        if len(content) > self.rules.fetch_bytes:
            raise bad(f"more than {self.rules.fetch_bytes} bytes", source.field)
        return content

    def _fetched(self, source: MediaSource) -> bytes:
        try:
            return self._fetcher.fetch(source.value)
        except SlowHost:
            raise APIError(504, f"the host of the {source.kind} took too long", source.field) from None
        except FetchError:
            raise _refused(source) from None

    def _file(self, source: MediaSource) -> bytes:
        try:
            return read_below(self.rules.local_path, source.value, self.rules.fetch_bytes)
        except FileRefused:
            raise _refused(source) from None

    async def _part(
        self, source: MediaSource, content: list[bytes], index: int, config: ImageProcessorConfig, left: int
    ) -> tuple[Image | Video, int]:
        """Return a part of the conversation, and how many pixels it has."""
        own = source.value[:5].lower() == "data:" or source.bare
        if source.kind == "image" or len(content) > 1 or _is_frames(source):
            frames, size = [], 0
            for one in content:
                image = await self._image(source, one, own, min(left - size, self.rules.image_pixels))
                size += image.width * image.height
                frames.append(image)
            if source.kind == "image":
                return Image(frames[0], index), size
            return Video(tuple(frames), index, fps=dict(source.sampling).get("fps")), size
        video, resized = await self._video(source, content[0], config, own)
        frames = tuple(map(PIL.Image.fromarray, video.frames))
        size = int(video.frames[..., 0].size)
        if size > left:
            raise bad(f"the media have more than {self.rules.request_pixels} pixels together", source.field)
        resized_for = config if resized else None
        return Video(frames, index, fps=video.fps, times=tuple(video.times), resized_for=resized_for), size

    async def _image(self, source: MediaSource, content: bytes, own: bool, most: int) -> PIL.Image.Image:
        if self._decoders is None:
            self._decoders = _Decoders(self.rules)
        shrink_to = _LOW_DETAIL if source.detail == "low" else None
        try:
            found = await self._decoders.decode(content, max(most, 0), self.rules.side, shrink_to)
        except UserError as error:
            raise bad(f"the image cannot be used: {error}", source.field) from None
        if found.problem:
            raise bad(f"the image cannot be used: {found.problem}", source.field) if own else _refused(source)
        return PIL.Image.frombytes("RGB", found.size, found.pixels)

    async def _video(
        self, source: MediaSource, content: bytes, config: ImageProcessorConfig, own: bool
    ) -> tuple[VideoFrames, bool]:
        """Return the sampled frames of a file, and whether they have the size that the image processor wants."""
        sampling = dataclasses.replace(config.sampling(), **dict(source.sampling))
        most = min(sampling.max_frames, self.rules.frames)
        sampling = dataclasses.replace(sampling, max_frames=most, min_frames=min(sampling.min_frames, most))
        size = self._processor.image_processor.frame_size(config)
        if self._videos is None:
            limit = functools.partial(decode.begin_videos, self.rules.image_pixels)
            seconds = 3 * self.rules.decode_seconds
            self._videos = VideoReader(self.rules.workers, seconds=seconds, seconds_per_second=0.0, begin=limit)
        read = functools.partial(self._videos.read, content, sampling, size=size, field=source.field)
        try:
            video = await asyncio.get_running_loop().run_in_executor(self._threads, read)
        except VideoSupportError:
            raise APIError(501, "this server reads no videos", source.field) from None
        except ExampleError:
            # what decoders say may hold anything
            why = bad("the video is of no known kind, damaged, or takes too long", source.field)
            raise why if own else _refused(source) from None
        if video.duration > self.rules.video_seconds:
            raise bad(f"the video is longer than {self.rules.video_seconds:g} s", source.field)
        return video, size is not None


class _Decoders(KillablePool):
    """Processes that decode images."""

    def __init__(self, rules: MediaRules):
        pebble = importlib.import_module("pebble")
        super().__init__(pebble, rules.workers, _TASKS, decode.begin, (rules.image_pixels,))
        self._seconds = rules.decode_seconds

    async def decode(self, content: bytes, most: int, side: int, shrink_to: int | None) -> decode.Decoded:
        """Return an image. Raises UserError where its process dies or takes too long."""
        arguments = (content, most, side, shrink_to)
        future = self._pool.schedule(decode.decode_image, args=arguments, timeout=self._seconds)
        try:
            return await asyncio.wrap_future(future)
        except (TimeoutError, concurrent.futures.TimeoutError) as error:
            raise UserError(f"decoding took longer than {self._seconds:g} s") from error
        except self._expired as error:
            raise UserError("decoding crashed") from error


def _refused(source: MediaSource) -> APIError:
    """One text for what is absent, not allowed or of no known kind: nobody learns which files or hosts there are."""
    return APIError(403, f"the {source.kind} is not allowed, not there, or cannot be read", source.field)


def _is_frames(source: MediaSource) -> bool:
    return source.value[: len(_FRAMES_HEAD)].lower() == _FRAMES_HEAD


def _from_base64(text: str) -> bytes | None:
    """Base64 of either alphabet, with or without line ends and padding."""
    try:
        plain = "".join(text.split()).rstrip("=").encode("ascii").translate(bytes.maketrans(b"-_", b"+/"))
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None

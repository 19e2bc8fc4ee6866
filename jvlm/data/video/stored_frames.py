"""Videos of an example as sampled frames, so that training opens no codec."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

from PIL import Image

from jvlm.data.errors import Origin
from jvlm.data.examples import parse_example
from jvlm.data.images import unwrap
from jvlm.data.values import without_nulls
from jvlm.data.video.reader import VideoReader
from jvlm.data.video.sampling import Sampling
from jvlm.validation import check_fields

_TURNS = ("messages", "rejected_messages")
_SETTINGS = tuple(field.name for field in dataclasses.fields(Sampling))


@dataclasses.dataclass(frozen=True)
class FrameOptions:
    """How the frames of videos are stored.

    Attributes:
      fps: frames a second, where a video does not set its own sampling.
      max_frames: most of a video.
      max_pixels: most pixels of a frame; larger ones are made smaller. The default is Qwen2.5-VL's.
      quality: of JPEG.
    """

    fps: float = 2.0
    max_frames: int = 768
    max_pixels: int = 768 * 784
    quality: int = 90

    def __post_init__(self):
        bounds = {"fps": "(0, inf)", "max_frames": "[2, inf)", "max_pixels": "[784, inf)", "quality": "[1, 100]"}
        check_fields(self, "frames.", bounds)

    def size(self, frames: int, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of a stored frame."""
        scale = math.sqrt(min(1.0, self.max_pixels / (width * height)))
        return max(1, int(width * scale)), max(1, int(height * scale))


def with_frames(record: dict[str, Any], origin: Origin, reader: VideoReader, options: FrameOptions) -> dict[str, Any]:
    """Return a record in which each video that holds its file is a list of JPEG frames and their rate.

    Raises:
      ExampleError: a video that cannot be read.
    """
    make = _Frames(origin, reader, options)
    changed = {key: make.media(record[key], key) for key in ("videos", "video") if record.get(key) is not None}
    for key in _TURNS:
        if isinstance(record.get(key), list):
            changed[key] = [make.turn(turn, f"{key}[{i}].content") for i, turn in enumerate(record[key])]
    if isinstance(record.get("document"), list):
        changed["document"] = [make.block(block, "document") for block in record["document"]]
    whole = {**record, **changed}
    parse_example(whole, origin)
    return whole


class _Frames:
    def __init__(self, origin: Origin, reader: VideoReader, options: FrameOptions):
        self.origin, self.reader, self.options = origin, reader, options

    def media(self, value: Any, field: str) -> Any:
        if isinstance(value, list):
            return [self.one(item, f"{field}[{i}]") for i, item in enumerate(value)]
        return self.one(value, field)

    def turn(self, turn: Any, field: str) -> Any:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
            return turn
        return {**turn, "content": [self.block(block, field) for block in turn["content"]]}

    def block(self, block: Any, field: str) -> Any:
        if not isinstance(block, dict) or block.get("video") is None:
            return block
        return {**block, "video": self.one(block["video"], field)}

    def one(self, video: Any, field: str) -> Any:
        given = without_nulls(video) if isinstance(video, dict) else {}
        source = unwrap(given.get("video", video))
        if not isinstance(source, bytes):
            return video  # a list of frames already
        sampling = {"fps": self.options.fps, "max_frames": self.options.max_frames}
        sampling["min_frames"] = min(4, self.options.max_frames)
        sampling |= {name: given[name] for name in _SETTINGS if name in given}
        where = {"origin": self.origin, "field": field, "name": _name(video)}
        read = self.reader.read(source, Sampling(**sampling), size=self.options.size, **where)
        frames = [{"bytes": self._jpeg(Image.fromarray(frame))} for frame in read.frames]
        return {"video": frames, "fps": read.fps}

    def _jpeg(self, image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=self.options.quality)
        return file.getvalue()


def _name(video: Any) -> str:
    """Return the path that came with the contents of a video; empty where none did."""
    while isinstance(video, dict):
        if isinstance(video.get("path"), str):
            return video["path"]
        video = video.get("video")
    return ""

"""An example in memory, a conversation or a document, of typed parts. Tags (<image>, ...) are a matter of JSON alone.

What is a `Text` here is text, whatever it spells: `jvlm.data.examples` reads and writes the tags of files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from jvlm.data.boxes import Region
from jvlm.data.choices import LossChoice
from jvlm.data.errors import Origin


@dataclasses.dataclass(frozen=True)
class Text:
    """Words."""

    text: str


@dataclasses.dataclass(frozen=True)
class Image:
    """An image, not read yet.

    Attributes:
      source: anything `jvlm.data.images.open_image` opens.
      index: its number among the images of the example, from 0, by which boxes name it. It stays the same where only
        some turns of the example are taken.
      folder: in which a relative path is looked up first; None for that of the example's file.
      upscale: factor by which it is made larger before the image processor sees it, in training.
      upscale_limit: longer side, in pixels, above which it is not made larger; None for no limit.
    """

    source: Any
    index: int = 0
    upscale: float = 1.0
    upscale_limit: int | None = None
    folder: str | None = None

    def upscaled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (width, height) after the upscaling, with the aspect kept; never smaller than ``size``."""
        longest = max(size)
        target = min(longest * self.upscale, self.upscale_limit or math.inf)
        return (round(size[0] * target / longest), round(size[1] * target / longest)) if target > longest else size


@dataclasses.dataclass(frozen=True)
class Video:
    """A video.

    Attributes:
      frames: each anything `jvlm.data.images.open_image` opens; empty where they are still in ``file``.
      index: its number among the videos of the example, from 0.
      folder: as of an `Image`.
      file: path or contents of a video file, from which frames are sampled; None where the frames are given.
      sampling: fields of `jvlm.data.video.sampling.Sampling` that the example sets for the file, as (name, value).
      fps: frames a second of ``frames``; None where nothing says it.
      times: of the frames, in seconds from the first one of the file; None where nothing says them.
      resized_for: settings of the image processor by which the frames have their size already; None if there are none.
    """

    frames: tuple[Any, ...] = ()
    index: int = 0
    folder: str | None = None
    file: Any = None
    sampling: tuple[tuple[str, Any], ...] = ()
    fps: float | None = None
    times: tuple[float, ...] | None = None
    resized_for: Any = None


@dataclasses.dataclass(frozen=True)
class ObjectName:
    """The name of an object in an image, <ref-object> in files; written as it is."""

    name: str


@dataclasses.dataclass(frozen=True)
class ObjectBox:
    """A box or point, <bbox> in files; written as the model's box format has it.

    Attributes:
      image: the `Image.index` of the image that it is on.
    """

    region: Region
    image: int = 0


@dataclasses.dataclass(frozen=True)
class ObjectTime:
    """A moment or a span of a video, <time> in files; written as the model's time format has it.

    Attributes:
      seconds: of the moment, or of the beginning and the end, counted from the beginning of the file.
    """

    seconds: tuple[float, ...]


# fields that hold files or pixels, which `==` cannot compare
_BARE: dict[type, dict[str, Any]] = {Image: {"source": None}, Video: {"frames": (), "file": None}}


def media_sources(part: Image | Video) -> tuple[Any, ...]:
    """Return the source of an image, the file of a video, or the sources of its frames."""
    if isinstance(part, Image):
        return (part.source,)
    return part.frames if part.file is None else (part.file,)


def same_media(one: _OfParts, other: _OfParts) -> bool:
    """Return whether two examples have the same images and videos, in the same order."""
    pairs = list(zip(one.media, other.media, strict=False))
    return len(one.media) == len(other.media) and all(a is b or _is_same(a, b) for a, b in pairs)


def _is_same(a: Image | Video, b: Image | Video) -> bool:
    """Whether two are read from the same file, or hold the same object in memory."""
    if type(a) is not type(b) or dataclasses.replace(a, **_BARE[type(a)]) != dataclasses.replace(b, **_BARE[type(b)]):
        return False
    sources = media_sources(a), media_sources(b)
    return len(sources[0]) == len(sources[1]) and all(
        x is y or (isinstance(x, str | bytes | Path) and type(x) is type(y) and x == y)
        for x, y in zip(*sources, strict=True)
    )


Part = Text | Image | Video | ObjectName | ObjectBox | ObjectTime


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
      content: its parts, given as such or as one text; neighbouring texts are joined, empty ones left out.
      loss_weight: of its loss; 0 for what is no assistant turn.
      loss_given: whether the example says so itself.
      fields: what else the chat template is given: tool_calls of an assistant turn, tool_call_id and name of a tool's.
    """

    role: str
    content: tuple[Part, ...]
    loss_weight: float = 0.0
    fields: tuple[tuple[str, Any], ...] = ()
    loss_given: bool = False

    def __post_init__(self):
        parts = (Text(self.content),) if isinstance(self.content, str) else self.content
        object.__setattr__(self, "content", tuple(_joined(parts)))

    @property
    def media(self) -> tuple[Image | Video, ...]:
        """Its images and videos, in order."""
        return tuple(part for part in self.content if isinstance(part, Image | Video))

    @property
    def boxes(self) -> tuple[ObjectBox, ...]:
        """Its boxes and points, in order."""
        return tuple(part for part in self.content if isinstance(part, ObjectBox))

    @property
    def text(self) -> str:
        """Its words, without everything else."""
        return "".join(part.text for part in self.content if isinstance(part, Text))

    def map(self, change: Callable[[Part], Part]) -> Message:
        """Return the message with every part changed."""
        return dataclasses.replace(self, content=tuple(map(change, self.content)))


def _joined(parts: Iterable[Part]) -> Iterator[Part]:
    words = ""
    for part in parts:
        if isinstance(part, Text):
            words += part.text
            continue
        if words:
            yield Text(words)
            words = ""
        yield part
    if words:
        yield Text(words)


class _OfParts:
    """What is asked of conversations and documents alike."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of its parts, in order."""
        raise NotImplementedError

    @property
    def media(self) -> tuple[Image | Video, ...]:
        """Images and videos, in order of appearance."""
        return tuple(part for part in self.parts if isinstance(part, Image | Video))

    @property
    def images(self) -> tuple[Image, ...]:
        """Images, in order of appearance."""
        return tuple(part for part in self.media if isinstance(part, Image))

    @property
    def videos(self) -> tuple[Video, ...]:
        """Videos, in order of appearance."""
        return tuple(part for part in self.media if isinstance(part, Video))

    @property
    def boxes(self) -> tuple[ObjectBox, ...]:
        """Boxes and points, in order of appearance."""
        return tuple(part for part in self.parts if isinstance(part, ObjectBox))


@dataclasses.dataclass(frozen=True)
class Conversation(_OfParts):
    """A checked example that a chat template renders.

    Attributes:
      image_settings: what the example changes about the image processor, as given: which one it is, is not known here.
      image_choice: what the run changes about it for this example, any of its fields.
      tools: schemas of the tools that the chat template tells the model of.
      extra: fields carried along, unknown ones included.
      loss: what has a loss, where the example says so for all of its turns together.
      prompt_weight: of the loss of all text that is no assistant turn.
      template_values: what the chat template is given beside messages and tools, as (name, value): enable_thinking.
      is_literal: a media token that its text spells is text like any other. Otherwise it is refused: in data it is
        mostly meant as an image.
    """

    messages: tuple[Message, ...]
    image_settings: tuple[tuple[str, Any], ...] = ()
    image_choice: tuple[tuple[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()
    origin: Origin = Origin()
    loss: LossChoice | None = None
    prompt_weight: float = 0.0
    template_values: tuple[tuple[str, Any], ...] = ()
    is_literal: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of its parts, in order."""
        return tuple(part for message in self.messages for part in message.content)

    def map(self, change: Callable[[Part], Part]) -> Conversation:
        """Return the conversation with every part of every message changed."""
        return dataclasses.replace(self, messages=tuple(message.map(change) for message in self.messages))

    def expanded(self, change: Callable[[Part], tuple[Part, ...]]) -> Conversation:
        """Return the conversation with others in the place of every part of every message."""
        messages = (
            dataclasses.replace(message, content=tuple(new for part in message.content for new in change(part)))
            for message in self.messages
        )
        return dataclasses.replace(self, messages=tuple(messages))


@dataclasses.dataclass(frozen=True)
class Document(_OfParts):
    """A checked example without turns, which no chat template renders: a page with images, a caption, text alone.

    Attributes:
      content: its pieces. Neighbouring texts stay pieces of their own, between which it may be cut; empty ones are
        left out.
      begins, ends: False for a part of a document that was cut before it, or behind it.
      image_settings, image_choice, extra, origin, loss: as of a `Conversation`.
    """

    content: tuple[Part, ...]
    begins: bool = True
    ends: bool = True
    image_settings: tuple[tuple[str, Any], ...] = ()
    image_choice: tuple[tuple[str, Any], ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()
    origin: Origin = Origin()
    loss: LossChoice | None = None

    def __post_init__(self):
        pieces = tuple(part for part in self.content if not isinstance(part, Text) or part.text)
        object.__setattr__(self, "content", pieces)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of its parts, in order."""
        return self.content

    @property
    def text(self) -> str:
        """Its words, without everything else."""
        return "".join(part.text for part in self.content if isinstance(part, Text))

    def map(self, change: Callable[[Part], Part]) -> Document:
        """Return the document with every piece changed."""
        return dataclasses.replace(self, content=tuple(map(change, self.content)))

    def expanded(self, change: Callable[[Part], tuple[Part, ...]]) -> Document:
        """Return the document with others in the place of every piece."""
        return dataclasses.replace(self, content=tuple(new for part in self.content for new in change(part)))


Parsed = TypeVar("Parsed", Conversation, Document)


def joined_text(content: Iterable[Part], written: Callable[[Part], Part]) -> tuple[Part, ...]:
    """Return the pieces of a document, a box, name or time of an object being part of the text that it stands in."""
    pieces: list[Part] = []
    inside = False
    for part in content:
        is_object = isinstance(part, ObjectName | ObjectBox | ObjectTime)
        part = written(part)
        if pieces and isinstance(part, Text) and isinstance(pieces[-1], Text) and (is_object or inside):
            pieces[-1] = Text(pieces[-1].text + part.text)
        else:
            pieces.append(part)
        inside = is_object
    return tuple(pieces)

"""One example as the model gets it: its text by token, its images at the encoder's size with boxes and points."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image

from jvlm.data.boxes import Box, Point, Region, Sizes
from jvlm.data.check import encoded
from jvlm.data.content import Conversation, Document, Image, Video, media_sources
from jvlm.data.encode import Encode
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import Read
from jvlm.data.examples import parse_example
from jvlm.data.packing import Example
from jvlm.data.processor import Processor

THUMBNAIL = 200  # pixels of the longer side
_TOKENS = 1500  # of text that are shown of an example
_IMAGES = 8  # images and frames shown of an example
_FRAMES = 4  # of a video


@dataclasses.dataclass(frozen=True)
class Span:
    """Neighbouring tokens that are alike, as text; ``weight`` is that of their loss."""

    text: str
    kind: Literal["text", "special", "media"]
    weight: float


@dataclasses.dataclass(frozen=True)
class ShownImage:
    """An image as a JPEG, stretched over ``width`` x ``height``: what the encoder sees, and where regions are."""

    name: str
    uri: str
    width: int
    height: int
    boxes: tuple[Box, ...]
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """An example of the page.

    Attributes:
      title: where it is from.
      why: what it was chosen for.
      facts: its numbers, in words.
      left_out: what is not shown of it, in words.
    """

    title: str
    why: str
    facts: str
    spans: tuple[Span, ...]
    pictures: tuple[ShownImage, ...]
    left_out: str


def sample_of(encode: Encode, read: Read, why: str) -> Sample:
    """Return an example that was found usable. Raises ExampleError if it is not any more."""
    if isinstance(read.record, ExampleError):
        raise read.record
    pairs, fitted = encoded(encode, parse_example(read.record, read.origin))
    parsed, example = pairs[0]
    if isinstance(parsed, Conversation) and isinstance(fitted[0], Example):
        example = fitted[0]  # truncated or shrunk
    pictures, more_images = _pictures(encode.processor, parsed, example.sizes)
    facts = f"{example.length:,} tokens, {int((example.loss_weights > 0).sum()):,} with a loss"
    facts += f", {example.num_patches:,} patches" if example.num_patches else ""
    facts += "" if example.made_to_fit == "no" else f", {example.made_to_fit}"
    parts = sum(isinstance(one, Example) for one in fitted)
    facts += f", cut into {parts} parts" if parts > 1 else ""
    shown = _shown_tokens(example)
    more = [
        (example.length - shown, "more tokens"),
        (more_images, "more images or frames"),
        (len(pairs) - 1, "more parts"),
    ]
    left_out = ", ".join(f"{count:,} {what}" for count, what in more if count)
    return Sample(title_of(parsed.origin), why, facts, _spans(encode.processor, example, shown), pictures, left_out)


def title_of(origin: Origin) -> str:
    """Return where an example is from, without the folder of its file."""
    return str(Origin(Path(origin.file).name, origin.number))


def thumbnail(image: PIL.Image.Image) -> str:
    """Return a JPEG of an image, of at most `THUMBNAIL` pixels a side, as a data URI."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _shown_tokens(example: Example) -> int:
    """Return the length of the beginning with so many tokens of text as are shown."""
    return int(np.searchsorted(np.cumsum(example.media == 0), _TOKENS, side="right"))


def _spans(processor: Processor, example: Example, count: int) -> tuple[Span, ...]:
    tokenizer = processor.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids, weights, media = (values[:count].tolist() for values in (example.tokens, example.loss_weights, example.media))

    def alike(index: int) -> tuple[int, bool, float]:
        """(image or video, whether special, loss weight) of a token."""
        number = media[index]
        return number, not number and ids[index] in special, weights[index]

    spans = []
    for (number, is_special, weight), group in itertools.groupby(range(len(ids)), alike):
        tokens = [ids[index] for index in group]
        if number:
            width, height = example.sizes[number - 1].resized
            spans.append(Span(f"media {number}: {width} x {height}, {len(tokens):,} tokens", "media", weight))
        else:
            text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            spans.append(Span(text, "special" if is_special else "text", weight))
    return tuple(spans)


def _pictures(
    processor: Processor, parsed: Conversation | Document, sizes: tuple[Sizes, ...]
) -> tuple[tuple[ShownImage, ...], int]:
    """(images and frames to show, how many more there are); of a truncated example those that are left."""
    pictures, count = [], 0
    opened = processor.with_open_media(parsed)
    for number, (part, size) in enumerate(zip(opened.media, sizes, strict=False), 1):
        frames = media_sources(part)
        count += len(frames)
        regions = [box.region.to("resized", size) for box in parsed.boxes if _is_on(box.image, part)]
        for frame in frames[: min(_FRAMES, _IMAGES - len(pictures))]:
            pictures.append(_picture(_name(part, number, size), frame, size, regions))
    return tuple(pictures), count - len(pictures)


def _is_on(image: int, part: Image | Video) -> bool:
    return isinstance(part, Image) and part.index == image


def _name(part: Image | Video, number: int, size: Sizes) -> str:
    what = "image" if isinstance(part, Image) else "frame of video"
    (width, height), (new_width, new_height) = size
    return f"{what} {number}: {width} x {height} to {new_width} x {new_height}"


def _picture(name: str, image: PIL.Image.Image, size: Sizes, regions: list[Region]) -> ShownImage:
    width, height = size.resized
    uri = thumbnail(image.resize((width, height), PIL.Image.Resampling.BICUBIC))
    boxes = tuple(region for region in regions if isinstance(region, Box))
    points = tuple(region for region in regions if isinstance(region, Point))
    return ShownImage(name, uri, width, height, boxes, points)

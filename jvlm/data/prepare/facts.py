"""What is known of an example without comparing it with others: digests, hashes of its images, keys of its text."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from jvlm.data.content import (
    Conversation,
    Document,
    Image,
    ObjectBox,
    ObjectName,
    ObjectTime,
    Part,
    Text,
    media_sources,
)
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import ExampleSource, Opening
from jvlm.data.examples import parse_example
from jvlm.data.images import content_digest, open_image
from jvlm.data.prepare.image_hash import HashBits, Thumbnail, perceptual_hash
from jvlm.data.prepare.ngrams import minhash_keys, normalized, shingles


@dataclasses.dataclass(frozen=True)
class Facts:
    """What `facts` finds out.

    Attributes:
      equal: digest of all that the example says and shows; its images by the bytes of their files.
      text: digest of its words, whatever their case and punctuation.
      images: perceptual hash of each image, as bytes.
      keys: `minhash_keys` of an example without images and videos, as bytes; empty if it has any, or no words.
    """

    equal: bytes
    text: bytes
    images: tuple[bytes, ...]
    keys: bytes


def facts(example: Conversation | Document, roots: tuple[str, ...], bits: HashBits) -> Facts:
    """Return the facts of an example. Raises ExampleError for an image that cannot be read."""
    content = json.dumps(_content(example, roots), ensure_ascii=True, sort_keys=True, default=repr)
    hashes = [
        perceptual_hash(_open(image, example.origin, roots), bits).astype(">u8").tobytes() for image in example.images
    ]
    found = shingles(text_of(example)) if not example.media else np.zeros(0, np.uint64)
    keys = minhash_keys(found).astype(">u8").tobytes() if len(found) else b""
    return Facts(_digest(content), _digest(normalized(text_of(example))), tuple(hashes), keys)


def texts_of(example: Conversation | Document) -> list[str]:
    """Return the text of each turn of the user and the assistant, or of a document."""
    if isinstance(example, Document):
        return [example.text]
    return [message.text for message in example.messages if message.role in ("user", "assistant")]


def text_of(example: Conversation | Document) -> str:
    """Return all of `texts_of`, a turn a line."""
    return "\n".join(texts_of(example))


def thumbnails(example: Conversation | Document, roots: tuple[str, ...]) -> tuple[Thumbnail, ...]:
    """Return what a second look sees of each image."""
    return tuple(Thumbnail.of(_open(image, example.origin, roots)) for image in example.images)


def _open(image: Image, origin: Origin, roots: tuple[str, ...]) -> PillowImage.Image:
    return open_image(image.source, origin=origin, roots=(image.folder, *roots) if image.folder else roots)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def _content(example: Conversation | Document, roots: tuple[str, ...]) -> Any:
    def part(one: Part) -> Any:
        match one:
            case Text(text):
                return text
            case ObjectName(name):
                return {"ref": name}
            case ObjectBox(region, image):
                return {"box": [*region.values, region.space, image]}
            case ObjectTime(seconds):
                return {"time": [*seconds]}
            case _:
                folders = (one.folder, *roots) if one.folder else roots
                digests = [content_digest(s, origin=example.origin, roots=folders).hex() for s in media_sources(one)]
                return {type(one).__name__: digests}

    if isinstance(example, Document):
        return ["document", [part(one) for one in example.content]]
    turns = [[m.role, [part(one) for one in m.content], m.fields] for m in example.messages]
    return ["conversation", turns, example.tools]


class Examples:
    """Parsed examples of files, by index. The files are opened again where it is unpickled.

    Args:
      media_root: folder for relative media paths, after the data file's own.
    """

    def __init__(self, source: ExampleSource, media_root: str | None = None):
        self.source, self.media_root = source, media_root
        self.thumbnails = functools.lru_cache(maxsize=48)(self._thumbnails)

    def __reduce__(self):
        return _opened, (self.source.opening, self.media_root)

    def __len__(self) -> int:
        return len(self.source)

    def roots(self, origin: Origin) -> tuple[str, ...]:
        """Return the folders in which relative paths of an example are looked up."""
        return (str(Path(origin.file).parent), *([self.media_root] if self.media_root else []))

    def parsed(self, index: int) -> Conversation | Document:
        """Return an example. Raises ExampleError for one that cannot be used."""
        origin, record = self.source[index]
        if isinstance(record, ExampleError):
            raise record
        return parse_example(record, origin)

    def facts(self, index: int, bits: HashBits) -> Facts:
        """Return the facts of an example. Raises ExampleError."""
        example = self.parsed(index)
        return facts(example, self.roots(example.origin), bits)

    def _thumbnails(self, index: int) -> tuple[Thumbnail, ...]:
        example = self.parsed(index)
        return thumbnails(example, self.roots(example.origin))


def _opened(opening: Opening, media_root: str | None) -> Examples:
    return Examples(opening.source(), media_root)

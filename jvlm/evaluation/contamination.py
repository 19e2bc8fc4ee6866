"""Questions of tasks that training data holds: by their words, and by their pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvlm.data.content import Conversation, Document, Image, Text
from jvlm.data.errors import MEMORY, ExampleError, Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_example
from jvlm.data.images import open_image
from jvlm.data.prepare.image_hash import MAX_DISTANCE, Thumbnail, distance, perceptual_hash, second_look
from jvlm.data.prepare.ngrams import NgramIndex
from jvlm.evaluation.task import Item

_BITS = 256


@dataclasses.dataclass(frozen=True)
class Found:
    """A question that training data holds.

    Attributes:
      id: of the question.
      kind: "text" for shared words, "image" for a picture that looks the same.
      where: the training example.
      what: the shared words, or in how many bits the pictures' hashes differ.
    """

    id: str
    kind: str
    where: str
    what: str


class TaskIndex:
    """The words and pictures of a task's questions, to be looked for in training data."""

    def __init__(self, items: Iterable[Item]):
        self.ids: list[str] = []
        self.unreadable = 0
        self._words = NgramIndex()
        hashes: list[np.ndarray] = []
        self._thumbnails: list[Thumbnail] = []
        self._of_image: list[int] = []
        for number, item in enumerate(items):
            self.ids.append(item.id)
            text = " ".join(part.text for part in item.content if isinstance(part, Text))
            self._words.add(number, f"{text} {item.answer}")
            for part in item.content:
                if isinstance(part, Image):
                    image = _opened(part, Origin())
                    if image is None:
                        self.unreadable += 1
                        continue
                    hashes.append(perceptual_hash(image, _BITS))
                    self._thumbnails.append(Thumbnail.of(image))
                    self._of_image.append(number)
        self._hashes = np.stack(hashes) if hashes else None

    def find(self, files: Sequence[str]) -> list[Found]:
        """Return the questions that training data holds, each once for each kind, with the first place."""
        found: dict[tuple[str, str], Found] = {}
        source = ExampleSource(list(files))
        for index in range(len(source)):
            origin, record = source[index]
            if isinstance(record, ExampleError):
                continue  # what training leaves out as well
            try:
                example = parse_example(record, origin)
            except ExampleError:
                continue
            for one in (*self._texts(example, origin), *self._images(example, origin)):
                found.setdefault((one.id, one.kind), one)
        return list(found.values())

    def _texts(self, example: Conversation | Document, origin: Origin) -> list[Found]:
        text = " ".join(part.text for part in example.parts if isinstance(part, Text))
        return [Found(self.ids[one.item], "text", str(origin), one.text) for one in self._words.find(text)]

    def _images(self, example: Conversation | Document, origin: Origin) -> list[Found]:
        if self._hashes is None:
            return []
        found = []
        for part in example.images:
            image = _opened(part, origin)
            if image is None:
                continue
            far = distance(self._hashes, np.broadcast_to(perceptual_hash(image, _BITS), self._hashes.shape))
            near = np.flatnonzero(far <= MAX_DISTANCE[_BITS])
            thumbnail = Thumbnail.of(image) if near.size else None
            for at in near:
                if thumbnail is not None and second_look(self._thumbnails[at], thumbnail).same:
                    what = f"{int(far[at])} of {_BITS} bits differ"
                    found.append(Found(self.ids[self._of_image[at]], "image", str(origin), what))
        return found


def _opened(part: Image, origin: Origin):
    """Return a picture; None for one that cannot be read."""
    roots = (part.folder,) if part.folder else () if origin.file == MEMORY else (str(Path(origin.file).parent),)
    try:
        return open_image(part.source, origin=origin, roots=roots)
    except ExampleError:
        return None


def summary(index: TaskIndex, found: Sequence[Found]) -> dict[str, Any]:
    """Return counts and places as values of JSON."""
    return {
        "questions": len(index.ids),
        "by_text": len({one.id for one in found if one.kind == "text"}),
        "by_image": len({one.id for one in found if one.kind == "image"}),
        "contaminated": sorted({one.id for one in found}),
        "unreadable_images": index.unreadable,
        "found": [dataclasses.asdict(one) for one in found],
    }

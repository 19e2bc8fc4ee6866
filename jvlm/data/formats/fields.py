"""Fields of a record, taken one by one; what is left is carried along."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jvlm.data import values
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.values import is_null, shown

# Names that ms-swift takes for the same field (swift/dataset/preprocessor/core.py), the first that is given counts.
QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = tuple(
    "response answer output targets target answer_key answers solution text completion content".split(),
)
SYSTEM = ("system", "system_prompt")
IMAGES = ("images", "image")
VIDEOS = ("videos", "video")


class Fields:
    """The fields of a record; those that are taken are gone from `rest`."""

    def __init__(self, record: dict[str, Any], origin: Origin):
        self._left, self.origin = dict(record), origin

    def first(self, *names: str) -> str | None:
        """Return the first of the names that is a field."""
        return next((name for name in names if not is_null(self._left.get(name))), None)

    def take(self, *names: str) -> Any:
        """Return the first field of these names, None if there is none."""
        name = self.first(*names)
        return None if name is None else self._left.pop(name)

    def need(self, *names: str) -> tuple[str, Any]:
        """Return (name, value) of the first field of these names. Raises ExampleError if there is none."""
        name = self.first(*names)
        if name is None:
            raise ExampleError(self.origin, names[0], "missing", f"Give it, or rename a column to {' or '.join(names)}")
        return name, self._left.pop(name)

    def take_text(self, *names: str) -> str | None:
        """Return a text, None if there is none. Raises ExampleError for what is no text."""
        name = self.first(*names)
        return None if name is None else text(self._left.pop(name), self.origin, name)

    def need_text(self, *names: str) -> str:
        """Return a text. Raises ExampleError if there is none."""
        name, value = self.need(*names)
        return text(value, self.origin, name)

    def take_system(self) -> list[dict[str, Any]]:
        """Return the system turn that a field of its own holds, as a list of one message or none."""
        system = self.take_text(*SYSTEM)
        return [] if not system else [{"role": "system", "content": system}]

    def images(self) -> list[Any]:
        """Return the images, which stay among the fields."""
        return images_of(self._left)

    def take_images(self) -> list[Any]:
        """Return the images. Raises ExampleError where there are two lists of them."""
        found = self.images()
        if len([name for name in IMAGES if not is_null(self._left.get(name))]) > 1:
            raise ExampleError(self.origin, "image", "given together with 'images'", "Keep 'images' only")
        for name in IMAGES:
            self._left.pop(name, None)
        return found

    def rest(self) -> dict[str, Any]:
        """Return the fields that nobody took."""
        return self._left


def images_of(record: dict[str, Any]) -> list[Any]:
    """Return the images of a record, in a list whatever field holds them."""
    value = next((record[name] for name in IMAGES if not is_null(record.get(name))), None)
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def videos_of(record: dict[str, Any]) -> list[Any]:
    """Return the videos of a record, in a list whatever field holds them."""
    value = next((record[name] for name in VIDEOS if not is_null(record.get(name))), None)
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def text(value: Any, origin: Origin, field: str) -> str:
    """Return a text; a number or a list of one text as text. Raises ExampleError for anything else."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, list | tuple) and value:
        raise ExampleError(origin, field, f"{len(value)} texts where one is wanted", "Keep one, or hide the column")
    if values.number(value) is not None and not isinstance(value, bool | np.bool_):
        value = value.item() if isinstance(value, np.generic) else value
        # Arrow and pandas make floats of whole numbers beside a missing one
        value = str(int(value)) if isinstance(value, float) and value == math.floor(value) < 2**53 else str(value)
    return values.text(value, origin, field)


def listed(value: Any) -> list[Any] | None:
    """Return a list; Arrow's and TFDS's struct of equally long lists as a list of structs; None for anything else."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, dict) and value and all(isinstance(column, list | tuple) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return None


def need_list(value: Any, origin: Origin, field: str) -> list[Any]:
    """Return a list, as `listed` does. Raises ExampleError for anything else, and for an empty one."""
    found = listed(value)
    if not found:
        problem = "empty" if found is not None else f"{shown(value)} is not a list"
        raise ExampleError(origin, field, problem, "Give a list")
    return found


def text_block(value: str) -> dict[str, Any]:
    """Return a content block of text."""
    return {"type": "text", "text": value}


def image_block(source: Any) -> dict[str, Any]:
    """Return a content block of an image."""
    return {"type": "image", "image": source}

"""One JSON array of objects."""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from typing import Any

import numpy as np

from jvlm.data.errors import Origin
from jvlm.data.readers import file_kinds
from jvlm.data.readers.reader import parse_json
from jvlm.errors import UserError
from jvlm.units import GIB

_MOST_BYTES = GIB  # read whole once, for the offsets
_SPACE = re.compile(r"[ \t\r\n]*")


def is_array(path: str) -> bool:
    """Return whether a text file begins as a JSON array does."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return start.startswith(b"[")


class JsonArray:
    """Holds the offset of each element of the array; reads one when asked.

    Raises:
      UserError: an array that is too large, is not closed, or holds what is not JSON.
    """

    def __init__(self, path: str):
        file_kinds.check_text(path)
        size = os.path.getsize(path)
        if size > _MOST_BYTES:
            raise UserError(
                f"{path}: one JSON array of {size / GIB:.1f} GiB; up to {_MOST_BYTES / GIB:.0f} GiB is read. Write one "
                f"object a line: jq -c '.[]' {path} > examples.jsonl"
            )
        self.path = path
        # what marks the structure of JSON is ASCII, so every byte may stand for one character
        with open(path, encoding="latin-1", newline="") as file:
            text = file.read()
        self._offsets = np.asarray(_elements(path, text), np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._offsets)

    def number(self, index: int) -> int:
        """Return the number of an element, from 1."""
        return index + 1

    def read(self, index: int, origin: Origin) -> Any:
        start, end = self._offsets[index]
        with open(self.path, "rb") as file:
            file.seek(start)
            element = file.read(end - start)
        return parse_json(element, origin, "Each element of the array must be one JSON object")


def _elements(path: str, text: str) -> array:
    """Start and end of each element, one after the other."""
    found, decoder = array("q"), json.JSONDecoder()
    at = _SPACE.match(text, text.index("[") + 1).end()
    try:
        while not text.startswith("]", at):
            _, end = decoder.raw_decode(text, at)
            found.extend((at, end))
            at = _SPACE.match(text, end).end()
            if text.startswith(",", at):
                at = _SPACE.match(text, at + 1).end()
            elif not text.startswith("]", at):
                raise UserError(_damaged(path, text, at, "neither a comma nor the end of the array"))
    except json.JSONDecodeError as error:
        raise UserError(_damaged(path, text, error.pos, error.msg)) from error
    except RecursionError as error:
        raise UserError(f"{path}: lists or objects nested too deep. Make the examples flatter") from error
    return found


def _damaged(path: str, text: str, at: int, problem: str) -> str:
    where = "at its end, so it may be cut short" if at >= len(text.rstrip()) else f"at byte {at:,}"
    return f"{path}: not a whole JSON array ({problem} {where}). Write it again, or as one object a line"

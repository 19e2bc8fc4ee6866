"""Tables as text: CSV with commas, TSV with tabs. Every value is text; an empty cell is a missing one.

Lists and objects are JSON in their cells, or as Python writes them, which pandas does.
"""

from __future__ import annotations

import ast
import csv
import io
import json
from array import array
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.readers import file_kinds
from jvlm.data.readers.reader import unique_object
from jvlm.errors import UserError

# columns whose cells are lists or objects
_STRUCTURED = frozenset(
    "messages rejected_messages conversations conversation prompt completion chosen rejected texts images videos "
    "history tools objects document chat_template_kwargs reward_model".split()
)
_MOST_CHARACTERS = 2**30  # of a cell, which may be an image as base64
_INDEX = "Unnamed: 0"  # as pandas reads the index that it wrote, in a first column without a name


class Csv:
    """Holds the offset of each row; reads one when asked.

    Raises:
      UserError: a header that lacks a name or has one twice, or is of other delimiters; text that is not UTF-8 or not
        CSV.
    """

    def __init__(self, path: str):
        file_kinds.check_text(path, "CSV")
        self.path, self._delimiter = path, "\t" if path.endswith(".tsv") else ","
        csv.field_size_limit(_MOST_CHARACTERS)
        offsets, start = array("q"), 0
        with open(path, "rb") as file:
            lines = _Lines(file)
            try:
                for cells in csv.reader(lines, delimiter=self._delimiter):
                    if cells:
                        offsets.extend((start, lines.end - start))
                    start = lines.end
            except UnicodeDecodeError as error:
                row = len(offsets) // 2 + 1
                raise UserError(
                    f"{path}: row {row} cannot be read as CSV: not UTF-8 ({error}). Write it in UTF-8"
                ) from error
            except csv.Error as error:
                raise UserError(f"{path}: row {len(offsets) // 2 + 1} cannot be read as CSV ({error})") from error
        table = np.asarray(offsets).reshape(-1, 2)
        self._header = [name.strip() for name in self._cells(*table[0])] if len(table) else []
        if len(self._header) > 1 and not self._header[0]:
            self._header[0] = _INDEX
        if len(self._header) == 1 and (other := next((sign for sign in ";\t|" if sign in self._header[0]), None)):
            fix = "Name it *.tsv" if other == "\t" else "Write it with commas"
            raise UserError(f"{path}: one column, {self._header[0][:80]!r}, whose name holds {other!r}. {fix}")
        twice = {name for name in self._header if self._header.count(name) > 1}
        if not all(self._header) or twice:
            problem = f"has {', '.join(sorted(map(repr, twice)))} twice" if twice else "lacks a name"
            raise UserError(f"{path}: its header {problem}. Give each column a name of its own in the first line")
        self._offsets = table[1:]

    def __len__(self) -> int:
        return len(self._offsets)

    def number(self, index: int) -> int:
        """Return the number of a row, from 1, the header left out."""
        return index + 1

    def read(self, index: int, origin: Origin) -> Any:
        cells = self._cells(*self._offsets[index])
        if len(cells) != len(self._header):
            problem = f"{len(cells)} cells for {len(self._header)} columns"
            return ExampleError(origin, "example", problem, "Put cells that hold commas or line ends in quotes")
        try:
            return {name: _value(name, cell, origin) for name, cell in zip(self._header, cells, strict=True) if cell}
        except ExampleError as error:
            return error

    def _cells(self, start: int, size: int) -> list[str]:
        csv.field_size_limit(_MOST_CHARACTERS)  # of this process
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(size).decode("utf-8-sig")
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter), [])


class _Lines:
    """Lines of a file as text, and how many bytes they were."""

    def __init__(self, file: BinaryIO):
        self._file, self.end = file, 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.end += len(line)
            yield line.decode("utf-8-sig" if self.end == len(line) else "utf-8")


def _value(name: str, cell: str, origin: Origin) -> Any:
    if name not in _STRUCTURED or cell.lstrip()[:1] not in ("[", "{"):
        return cell
    try:
        return json.loads(cell, object_pairs_hook=lambda pairs: unique_object(origin, pairs))
    except (ValueError, RecursionError):  # text that begins with a bracket, or a list as Python writes it
        pass
    try:
        value = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return cell
    if isinstance(value, list) and ... in value:
        problem = "a list that was cut short with ... when it was written"
        raise ExampleError(origin, name, problem, "Write the table again, with lists as JSON")
    return value if isinstance(value, list | dict) else cell

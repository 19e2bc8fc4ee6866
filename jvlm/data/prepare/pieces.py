"""Work on many examples in pieces, kept on disk once they are done: a killed command does none of them twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack

from jvlm.data.engines.engine import Engine, InProcess, Task
from jvlm.errors import file_errors

SIZE = 256  # examples of a piece


class Pieces:
    """Values of numbered things, computed a piece at a time and kept in files of a folder.

    Args:
      folder: made if it is not there.
      name: of the files.
      identity: of the things and how they are worked on; files of another are computed again.
      count: things.

    Attributes:
      kept: pieces that were there already.
    """

    def __init__(self, folder: Path, name: str, identity: str, count: int, size: int = SIZE):
        with file_errors(folder, "written"):
            folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.identity, self.count, self.size = folder, name, identity, count, size
        self.kept = 0

    def run(self, task: Task, engine: Engine = InProcess()) -> Iterator[list[Any]]:
        """Yield the values of each piece in order. Those of pieces that are done early wait on the disk."""
        parts = [range(start, min(start + self.size, self.count)) for start in range(0, self.count, self.size)]
        missing = [number for number, some in enumerate(parts) if self._read(number, len(some)) is None]
        self.kept = len(parts) - len(missing)
        found, waiting = engine.run(task, [parts[number] for number in missing]), set(missing)
        for number, some in enumerate(parts):
            values = None
            while number in waiting:  # until it is this one's values that came
                index, values = next(found)
                self._write(missing[index], values)
                waiting.remove(missing[index])
            yield self._read(number, len(some)) if values is None else values

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:07d}.msgpack"

    def _read(self, number: int, count: int) -> list[Any] | None:
        try:
            found = msgpack.unpackb(self._path(number).read_bytes())
        except (OSError, ValueError, msgpack.UnpackException):  # not there, or cut short by a full disk: done again
            return None
        usable = isinstance(found, dict) and found.get("of") == self.identity and len(found["values"]) == count
        return found["values"] if usable else None

    def _write(self, number: int, values: list[Any]) -> None:
        path = self._path(number)
        part = path.with_suffix(".partial")
        with file_errors(path, "written"):
            with open(part, "wb") as file:
                file.write(msgpack.packb({"of": self.identity, "values": values}))
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)

"""Judged groups of answers on disk, as they come: a run that is killed makes none of them again.

One file for each optimizer step, ``<run>/journal/STEP.jsonl``. Its first line names what the groups were made with. A
line is with the system before anything is decided by it, so that a killed process loses none, and on the disk before
the step's update.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from jvlm.errors import UserError
from jvlm.rl.records import GroupRecord

FOLDER = "journal"


class Journal:
    """The journal of a run. Call `begin` before each step.

    Args:
      folder: of the run.
    """

    def __init__(self, folder: Path):
        self.folder = folder / FOLDER
        self._file: TextIO | None = None
        self._current: Path | None = None

    def begin(self, version: int, made_with: Mapping[str, Any]) -> dict[int, GroupRecord]:
        """Open the file of a step; return its groups by serial number, as far as they are whole.

        Args:
          made_with: what decides the answers: fingerprints of the weights, settings. Groups made with something else
            are dropped.
        """
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        path, head = self._path(version), json.dumps(dict(made_with), sort_keys=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        groups: dict[int, GroupRecord] = {}
        if lines and lines[0] == head:
            for line in lines[1:-1]:  # what stands behind the last line break was cut short
                try:
                    group = GroupRecord.of_line(line)
                except UserError:
                    break
                groups[group.serial] = group
        # written anew: nothing may be appended to a line that was cut short
        beside = path.with_name(f".{path.name}.part")
        with open(beside, "w", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in (head, *(group.line() for group in groups.values()))))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        self._current = path
        return groups

    def add(self, group: GroupRecord) -> str:
        """Write a group of the step down, in place of what is there of it; see `close`. Returns its line."""
        assert self._current is not None
        if self._file is None:
            self._file = open(self._current, "a", encoding="utf-8")  # noqa: SIM115  (closed by `close`)
        line = group.line()
        self._file.write(line + "\n")
        self._file.flush()
        return line

    def forget(self, before: int) -> None:
        """Remove the files of steps before one that will never be run again."""
        for path in self.folder.glob("*.jsonl"):
            if path.stem.isdigit() and int(path.stem) < before:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file, whose groups are on the disk then."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _path(self, version: int) -> Path:
        return self.folder / f"{version:08d}.jsonl"

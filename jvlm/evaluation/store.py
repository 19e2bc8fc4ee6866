"""Answers on disk: one line of JSON each, appended as they come, so that a crash loses none of them.

OUTPUT/TASK/settings.json  what decides the answers; another run may go on only with the same
OUTPUT/TASK/answers.jsonl  each reply with its question
OUTPUT/TASK/scores.jsonl   the score of each answer, written anew by every scoring
OUTPUT/TASK/score.json     the score of the task
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jvlm import config as config_tree
from jvlm.data.boxes import Sizes
from jvlm.errors import UserError, file_errors
from jvlm.evaluation.task import Item
from jvlm.inference.file_lock import locked
from jvlm.json_files import read_object

SETTINGS, ANSWERS, SCORES, SCORE = "settings.json", "answers.jsonl", "scores.jsonl", "score.json"
LIMIT = "limit"  # of the settings what may change from run to run: how many questions are asked, of a part of a task


@dataclasses.dataclass(frozen=True)
class Stored:
    """A reply on disk.

    Attributes:
      run: which time the question was asked, from 0.
      question: what was asked, <image> for images.
      error: why there is no reply; such a question is asked again when a run goes on.
    """

    item: Item
    run: int
    prompt_hash: str
    question: str
    text: str
    finish: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0
    error: str = ""
    sizes: tuple[Sizes, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the values of a line."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        item = {field.name: getattr(self.item, field.name) for field in dataclasses.fields(Item)}
        item.pop("content")
        return {**values, "item": item}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Stored:
        """Return the reply of a line. Raises KeyError or TypeError for a line of another kind."""
        item = Item(content=(), **values["item"])
        sizes = tuple(Sizes(tuple(one[0]), tuple(one[1])) for one in values["sizes"])
        return cls(**{**values, "item": item, "sizes": sizes})


class AnswerStore:
    """The answers of one task, written by one run at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: Any = None

    @contextlib.contextmanager
    def writing(self, settings: Mapping[str, Any], *, limit: int | None = None) -> Iterator[AnswerStore]:
        """Hold the answers for writing; a last line that a crash cut is cut off.

        Args:
          limit: questions that are asked; None where it is all of the task.

        Raises:
          UserError: answers that were made with other settings are there, or another run writes them.
        """
        with file_errors(self.folder, "written"):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ANSWERS
        with locked(path):
            self.check(settings)
            write_json(self.folder / SETTINGS, {**settings, LIMIT: limit})
            if path.exists():
                whole = path.read_bytes()
                end = whole.rfind(b"\n") + 1
                if end < len(whole):
                    with open(path, "r+b") as file:
                        file.truncate(end)
            with open(path, "ab") as self._file:
                yield self

    def check(self, settings: Mapping[str, Any], *, partly: bool = False) -> None:
        """Raise UserError if answers are there that were made with other settings.

        Args:
          partly: these are some of the settings; the others are not known yet.
        """
        target = self.folder / SETTINGS
        if not target.exists():
            return
        there, values = read_object(target), json.loads(json.dumps(settings))
        there.pop(LIMIT, None)
        if partly:
            there = {name: there.get(name) for name in values}
        changes = list(config_tree.differences(there, values))
        if changes:
            raise UserError(
                f"{self.folder} holds answers made with other settings: {'; '.join(changes[:8])}. "
                "Give another --output, or the settings of before"
            )

    def add(self, stored: Stored) -> None:
        """Append one reply; it is on the disk when this returns."""
        line = json.dumps(stored.to_json(), ensure_ascii=False).encode("utf-8", "backslashreplace")
        self._file.write(line + b"\n")
        self._file.flush()

    def read(self) -> dict[tuple[str, int], Stored]:
        """Return the last reply to each (question, run). Raises UserError for a line that is none."""
        path = self.folder / ANSWERS
        found: dict[tuple[str, int], Stored] = {}
        if not path.exists():
            return found
        with file_errors(path, "read"), open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # cut by a crash
                try:
                    one = Stored.from_json(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{path}, line {number} is no answer of jvlm evaluate ({error})") from error
                found[one.item.id, one.run] = one
        return found

    def settings(self) -> dict[str, Any]:
        """Return the settings that the answers were made with. Raises UserError if there are none."""
        return read_object(self.folder / SETTINGS)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file; it appears under its name once it is whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with file_errors(path, "written"):
        part.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        part.replace(path)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file; it appears under its name once it is whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with file_errors(path, "written"):
        with open(part, "w") as file:
            file.writelines(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        part.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the values of a JSONL file."""
    with file_errors(path, "read"), open(path) as file:
        return [json.loads(line) for line in file]

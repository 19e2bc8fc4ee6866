"""Errors about data, which say which example, which field, and what to do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from jvlm.errors import UserError

MEMORY = "<memory>"
Kind = Literal["bad", "too_long", "skipped", "part"]
# where a message stops being the same for every example with its fault: at the first number, name or quotation
_VARIABLE = re.compile(r"[\d'\"\[({</\\:;,].*", re.DOTALL)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a conversation came from.

    Attributes:
      file: its file; `MEMORY` for one that was given from Python.
      number: its line in a JSONL file, its record in others, from 1; its index in a list of conversations, from 0;
        None for one that was given alone.
      source: path of its source in a mixture; empty where there is none.
    """

    file: str = MEMORY
    number: int | None = None
    source: str = ""

    def __str__(self) -> str:
        if self.number is None:
            return "the conversation"
        return (
            f"conversation {self.number}" if self.file == MEMORY else f"{self.file}, {unit_of(self.file)} {self.number}"
        )


def unit_of(file: str) -> str:
    """Return what the number of an example in a file counts: "line" where the file is text, else "example"."""
    return "line" if file.endswith(".jsonl") else "example"


class ExampleError(UserError):
    """An example that cannot be used."""

    def __init__(self, origin: Origin, field: str, problem: str, fix: str):
        self.origin, self.field = origin, field
        self.problem, self.fix = _printable(problem), _printable(fix)
        super().__init__(_printable(f"{origin}, field {field!r}: {self.problem}. {self.fix}"))

    def __reduce__(self):  # exceptions pickle by their args alone; workers send these to the main process
        return type(self), (self.origin, self.field, self.problem, self.fix)


class SkippedError(ExampleError):
    """An example that a rule of the configuration leaves out."""


def _printable(text: str) -> str:
    """Return the text with surrogates, as a cut emoji or an odd file name leaves them, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclasses.dataclass(frozen=True)
class Rejected:
    """An example left out of training, counted and listed.

    Attributes:
      file, number: as in `Origin`.
      kind: "bad" for one that cannot be read, "too_long" for one that does not fit a packed sequence, "skipped" for one
        that a rule of the configuration leaves out, "part" for a part of a document of which other parts are used.
      fix: what the user can do.
      source: path of its source in a mixture; empty where there is none.
    """

    file: str
    number: int | None
    field: str
    reason: str
    kind: Kind = "bad"
    fix: str = ""
    source: str = ""

    @classmethod
    def of(cls, error: ExampleError, kind: Kind) -> Rejected:
        """Return the example of an error; of one that is left out by rule, whatever the kind."""
        kind = "skipped" if isinstance(error, SkippedError) else kind
        origin = error.origin
        return cls(origin.file, origin.number, error.field, error.problem, kind, error.fix, origin.source)

    @property
    def fault(self) -> tuple[str, ...]:
        """What is wrong, the same for all examples with this fault: without numbers, names, or which turn it is."""
        return self.kind, re.sub(r"\d+", "*", self.field), _VARIABLE.sub("", self.reason), _QUOTED.sub("*", self.fix)


def grouped(rejected: Iterable[Rejected], *, most: int = 5) -> str:
    """One line for each reason: how many examples, the worst of them, the first three origins, and the fix.

    Reasons that differ in their numbers and names only are one (`Rejected.fault`).
    """
    groups: dict[tuple[str, ...], list[Rejected]] = {}
    for example in rejected:
        groups.setdefault(example.fault, []).append(example)
    ordered = sorted(groups.values(), key=len, reverse=True)
    lines = []
    for examples in ordered[:most]:
        worst = max(examples, key=lambda example: _first_number(example.reason))
        at_most = "up to " if len({example.reason for example in examples}) > 1 and worst.reason[:1].isdigit() else ""
        origins = _origins(examples[:3])
        lines.append(f"  {len(examples)} x field {worst.field!r}: {at_most}{worst.reason} ({origins}). {worst.fix}")
    others = sum(map(len, ordered[most:]))
    return "\n".join([*(line.rstrip() for line in lines), *([f"  {others} x other reasons"] if others else [])])


def _first_number(text: str) -> int:
    match = re.search(r"\d+", text)
    return int(match[0]) if match else 0


def _origins(examples: Sequence[Rejected]) -> str:
    if len({example.file for example in examples}) > 1 or examples[0].file == MEMORY:
        return "; ".join(str(Origin(example.file, example.number)) for example in examples)
    numbers = ", ".join(str(example.number) for example in examples)
    return f"{examples[0].file}, {unit_of(examples[0].file)}{'s' * (len(examples) > 1)} {numbers}"

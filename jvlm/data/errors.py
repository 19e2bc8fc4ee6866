"""Errors about data, which say which row, which field, and what to do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from jvlm.errors import UserError

MEMORY = "<memory>"
# where a message stops being the same for every row with its fault: at the first number, name or quotation
_VARIABLE = re.compile(r"[\d'\"\[({</\\:;,].*", re.DOTALL)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a conversation came from.

    Attributes:
      file: its file; `MEMORY` for one that was given from Python.
      row: its number: from 1 in a file (line of a JSONL, record of a shard), from 0 in a list of conversations; None
        for one that was given alone.
    """

    file: str = MEMORY
    row: int | None = None

    def __str__(self) -> str:
        if self.row is None:
            return "the conversation"
        return f"conversation {self.row}" if self.file == MEMORY else f"{self.file}, row {self.row}"


class RowError(UserError):
    """A row that cannot be used."""

    def __init__(self, origin: Origin, field: str, problem: str, fix: str):
        self.origin, self.field = origin, field
        self.problem, self.fix = _printable(problem), _printable(fix)
        super().__init__(_printable(f"{origin}, field {field!r}: {self.problem}. {self.fix}"))

    def __reduce__(self):  # exceptions pickle by their args alone; workers send these to the main process
        return RowError, (self.origin, self.field, self.problem, self.fix)


def _printable(text: str) -> str:
    """The text with surrogates, as a cut emoji or an odd file name leaves them, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row left out of training, kept so that it can be counted and listed.

    Attributes:
      kind: "bad" for one that cannot be read, "too_long" for one that does not fit a packed sequence.
      fix: what the user can do.
    """

    file: str
    row: int
    field: str
    reason: str
    kind: Literal["bad", "too_long"] = "bad"
    fix: str = ""

    @classmethod
    def of(cls, error: RowError, kind: Literal["bad", "too_long"]) -> Rejected:
        """The row of an error."""
        return cls(error.origin.file, error.origin.row, error.field, error.problem, kind, error.fix)

    @property
    def fault(self) -> tuple[str, ...]:
        """What is wrong, the same for all rows with this fault: without numbers, names, or which turn it is."""
        return self.kind, re.sub(r"\d+", "*", self.field), _VARIABLE.sub("", self.reason), _QUOTED.sub("*", self.fix)


def grouped(rejected: Iterable[Rejected], *, most: int = 5) -> str:
    """One line for each reason: how many rows, the worst of them, the first three places, and the fix.

    Reasons that differ in their numbers and names only are one (`Rejected.fault`).
    """
    groups: dict[tuple[str, ...], list[Rejected]] = {}
    for row in rejected:
        groups.setdefault(row.fault, []).append(row)
    ordered = sorted(groups.values(), key=len, reverse=True)
    lines = []
    for rows in ordered[:most]:
        worst = max(rows, key=lambda row: _first_number(row.reason))
        at_most = "up to " if len({row.reason for row in rows}) > 1 and worst.reason[:1].isdigit() else ""
        lines.append(
            f"  {len(rows)} x field {worst.field!r}: {at_most}{worst.reason} ({_places(rows[:3])}). {worst.fix}"
        )
    others = sum(map(len, ordered[most:]))
    return "\n".join([*(line.rstrip() for line in lines), *([f"  {others} x other reasons"] if others else [])])


def _first_number(text: str) -> int:
    found = re.search(r"\d+", text)
    return int(found[0]) if found else 0


def _places(rows: Sequence[Rejected]) -> str:
    if len({row.file for row in rows}) > 1 or rows[0].file == MEMORY:
        return "; ".join(str(Origin(row.file, row.row)) for row in rows)
    return f"{rows[0].file}, row{'s' * (len(rows) > 1)} {', '.join(str(row.row) for row in rows)}"

"""Errors about data, which say which row, which field, and what to do; and what kinds are the user's to mend."""

from __future__ import annotations

import dataclasses

from jvlm.errors import UserError

# Trying again helps against other errors, never against these.
MISTAKES = (ValueError, FileNotFoundError, FileExistsError)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a conversation came from: file and 1-based row (line of a JSONL, record of a shard)."""

    file: str = "<memory>"
    row: int = 0

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


class RowError(UserError):
    """A row that cannot be used."""

    def __init__(self, origin: Origin, field: str, problem: str, fix: str):
        self.origin, self.field, self.problem, self.fix = origin, field, problem, fix
        super().__init__(f"{origin}, field {field!r}: {problem}. {fix}")

    def __reduce__(self):  # exceptions pickle by their args alone; workers send these to the main process
        return RowError, (self.origin, self.field, self.problem, self.fix)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row left out of training, kept so that it can be counted and listed."""

    file: str
    row: int
    field: str
    reason: str

"""The score of one answer."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of one answer.

    Attributes:
      value: from 0 to 1; None where there is none, for a reason that is not the model's (a judge that failed, a
        reference that cannot be used). It must be left out of means and counted, never taken for 0.
      reason: "ok" for an answer that was read and compared (of those that are right or wrong: for a right one);
        "wrong"; or why it could not be: "empty", "thinking_only", "unparsed", "several_answers", "contradiction",
        "out_of_range", "truncated", "timeout", "wrong_format", "wrong_FIELD" of an action, "service_error",
        "gold_unusable".
      parsed: what was read from the answer.
    """

    value: float | None
    reason: str = "ok"
    parsed: Any = None

    def __post_init__(self):
        if self.value is not None and not 0 <= self.value <= 1:
            raise ValueError(f"a score is from 0 to 1, got {self.value}")

    @classmethod
    def of(cls, right: bool, parsed: Any = None) -> Score:
        """Return 1 or 0."""
        return cls(1.0, "ok", parsed) if right else cls(0.0, "wrong", parsed)

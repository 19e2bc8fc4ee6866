"""An answer to be judged, and what can judge it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jvlm.errors import UserError
from jvlm.scoring.score import Score


class UnfitReward(UserError):
    """A source by which nothing may be trained; it ends the run, where any other failure makes answers missing."""


@dataclasses.dataclass(frozen=True)
class RewardItem:
    """One answer to be judged.

    Attributes:
      id: names it in errors and in lists of what is missing.
      task: chooses the reward.
      answer: text of the model.
      gold: what is right, of the type that the task's reward reads.
      messages: the conversation before the answer.
      images: bytes of the image files of ``messages``.
      columns: further fields of the example, which plug-ins and some rewards read.
      truncated: whether the answer was cut at its longest length.
      thinking_opened: whether the prompt ended with an opened ``<think>``.
      token_ids: of the answer, which plug-ins may ask for.
    """

    id: str
    task: str
    answer: str
    gold: Any = None
    messages: tuple[Mapping[str, Any], ...] = ()
    images: tuple[bytes, ...] = ()
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    truncated: bool = False
    thinking_opened: bool = False
    token_ids: tuple[int, ...] = ()

    @property
    def prompt(self) -> str:
        """Return the text of the last message that is the user's."""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                content = message.get("content")
                parts = content if isinstance(content, list) else [{"text": content}]
                return "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))
        return ""


class RewardSource(Protocol):
    """Judges answers."""

    def describe(self) -> dict[str, Any]:
        """Return what decides the rewards, as JSON: a name, a version or hash of the code. No secrets."""
        ...

    def check(self, item: RewardItem) -> None:
        """Raise UserError where the reference of an item cannot be used, before any answer is judged."""
        ...

    def scores(self, items: Sequence[RewardItem]) -> list[Score]:
        """Return the reward of each item, in their order."""
        ...

    def close(self) -> None:
        """Free processes and connections."""
        ...


def missing(problem: object) -> Score:
    """Return the score of an answer that could not be judged, for a reason that is not the model's."""
    return Score(None, "service_error", " ".join(str(problem).split())[:300])

"""What is known of a group of answers, as it is written down: enough to judge and to train on it again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jvlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class AnswerRecord:
    """One answer.

    Attributes:
      tokens: with the one that ended it.
      log_probs: of each token in the distribution that it was drawn from, in the engine.
      entropies: of that distribution, in nats.
      versions: optimizer steps behind the weights that drew each token.
      text: without special tokens.
      finish: "stop", or "length" for an answer that was cut.
      reward: raw, from 0 to 1; None where it is missing.
      reason, parsed: why, and what was read from the answer.
      old_log_probs: of each token before the first update, in the trainer; empty where the engine's are taken.
      shaped: the reward with what is added for its length; None for a group that was not trained on, as ``advantage``.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    entropies: tuple[float, ...]
    versions: tuple[int, ...]
    text: str
    finish: str
    reward: float | None = None
    reason: str = ""
    parsed: Any = None
    old_log_probs: tuple[float, ...] = ()
    shaped: float | None = None
    advantage: float | None = None

    @property
    def truncated(self) -> bool:
        """Whether it was cut."""
        return self.finish == "length"


@dataclasses.dataclass(frozen=True)
class GroupRecord:
    """The answers to one prompt.

    Attributes:
      serial: number of the group in the run.
      example: index of the prompt's example among the prompts of the run.
      origin: file and line of it.
      task: of its reward.
      version: optimizer steps behind the weights when it was started.
      from_pool: whether it was drawn from the easy prompts.
      prompt_tokens: of the prompt, with its pictures.
      answers: in the order of their numbers.
      problem: why there are no answers, where the prompt cannot be used.
      selected: whether a step trained on it.
      judge_seconds: that the rewards took.
    """

    serial: int
    example: int
    origin: str
    task: str
    version: int
    from_pool: bool
    prompt_tokens: int
    answers: tuple[AnswerRecord, ...]
    problem: str = ""
    selected: bool = False
    judge_seconds: float = 0.0

    @property
    def rewards(self) -> list[float | None]:
        """Raw rewards of the answers."""
        return [answer.reward for answer in self.answers]

    def line(self) -> str:
        """Return the group as one line of JSON, without a line break."""
        values = vars(self) | {"answers": [vars(answer) for answer in self.answers]}
        return json.dumps(values, default=_plain, ensure_ascii=False)

    @classmethod
    def of_line(cls, line: str) -> GroupRecord:
        """Return the group of a `line`. Raises UserError for one of another form."""
        try:
            return cls.of_values(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"a record of a group of answers cannot be read: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> GroupRecord:
        """Return the group of a `line` as JSON. Raises TypeError, KeyError for one of another form."""
        return cls(**{**values, "answers": tuple(_answer(one) for one in values["answers"])})


def _answer(values: Mapping[str, Any]) -> AnswerRecord:
    lists = {name: tuple(values[name]) for name in ("tokens", "log_probs", "entropies", "versions", "old_log_probs")}
    return AnswerRecord(**{**values, **lists})


def _plain(value: Any) -> Any:
    """Return what JSON does not know as something that it does."""
    if hasattr(value, "tolist"):  # of numpy
        return value.tolist()
    return str(value)


def with_training(group: GroupRecord, shaped: Sequence[float | None], advantages: Sequence[float]) -> GroupRecord:
    """Return a group that a step trains on, with the shaped rewards and the advantages of its answers."""
    answers = tuple(
        dataclasses.replace(answer, shaped=reward, advantage=advantage)
        for answer, reward, advantage in zip(group.answers, shaped, advantages, strict=True)
    )
    return dataclasses.replace(group, answers=answers, selected=True)

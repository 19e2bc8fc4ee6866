"""What training changed: answers before and after it to the same questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jvlm.evaluation.questions import normalise
from jvlm.evaluation.score import YES_NO, Answer
from jvlm.scoring.statistics import Interval, compare, mean_interval

WORDS, BOXES = "words", "mean IoU of boxes"
_PERCENT = 100.0


@dataclasses.dataclass(frozen=True)
class Gain:
    """A score before and after training, with 95 % intervals by the bootstrap. Questions of one example, which are
    about one image, are drawn together.

    Attributes:
      name: of what is scored.
      unit: 100 where the score is shown in percent, else 1.
      questions: how many.
      change: of the means, after minus before.
    """

    name: str
    unit: float
    questions: int
    before: Interval
    after: Interval
    change: Interval

    def shown(self, interval: Interval, *, sign: bool = False) -> str:
        """Return an interval of this score as text."""
        digits = 1 if self.unit == _PERCENT else 3
        value, low, high = (
            f"{self.unit * number:{'+' if sign else ''}.{digits}f}" for number in dataclasses.astuple(interval)
        )
        return f"{value} [{low}, {high}]"


def gains(before: Sequence[Answer], after: Sequence[Answer]) -> list[Gain]:
    """Return what changed, of each kind of question that was asked.

    Raises:
      ValueError: the answers are not to the same questions.
    """
    if [_key(answer) for answer in before] != [_key(answer) for answer in after]:
        raise ValueError("the answers before and after training are not to the same questions")
    kinds: dict[str, tuple[float, Callable[[Answer], bool], Callable[[Answer], float]]] = {
        WORDS: (_PERCENT, lambda a: not a.question.boxes, lambda a: a.score),
        "- yes/no": (_PERCENT, lambda a: not a.question.boxes and _is_yes_no(a), lambda a: a.score),
        "- other": (_PERCENT, lambda a: not a.question.boxes and not _is_yes_no(a), lambda a: a.score),
        BOXES: (1.0, lambda a: bool(a.question.boxes), lambda a: a.score),
        "- IoU of 0.5 or more": (_PERCENT, lambda a: bool(a.question.boxes), lambda a: float(a.score >= 0.5)),
    }
    found = []
    for name, (unit, belongs, value) in kinds.items():
        pairs = [(b, a) for b, a in zip(before, after, strict=True) if belongs(a)]
        if pairs:
            one, other = (np.array([value(answer) for answer in side]) for side in zip(*pairs, strict=True))
            images = [answer.question.origin for _, answer in pairs]
            intervals = [mean_interval(scores, groups=images) for scores in (one, other)]
            found.append(Gain(name, unit, len(pairs), *intervals, compare(one, other, groups=images).difference))
    return found


def _key(answer: Answer) -> tuple:
    return answer.question.origin, answer.question.turn


def _is_yes_no(answer: Answer) -> bool:
    return normalise(answer.question.expected) in YES_NO


def table(changes: Sequence[Gain]) -> str:
    """Return gains as lines for the terminal."""
    lines = [f"{'95 % intervals':<22} {'questions':>9}  {'before':<22} {'after':<22} change"]
    for gain in changes:
        before, after = gain.shown(gain.before), gain.shown(gain.after)
        change = gain.shown(gain.change, sign=True)
        lines.append(f"{gain.name:<22} {gain.questions:>9,}  {before:<22} {after:<22} {change}")
    return "\n".join(lines)

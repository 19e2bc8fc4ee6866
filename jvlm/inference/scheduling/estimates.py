"""What the scheduler learns while it runs: how long steps take, and how long answers get."""

from __future__ import annotations

import math
from typing import Literal

from jvlm.inference.scheduling.config import SchedulerConfig

_WEIGHT = 0.1  # of the newest observation
_LEAST_RATIO = 0.1

Kind = Literal["encode", "prefill", "decode"]


class Pace:
    """How many decode steps run between two steps of prefill (or encode), so that decoding keeps its goal.

    With times p of such a step and d of a decode step, a token takes (p + k d) / k seconds when k decode steps follow:
    at most the goal from k = p / (goal - d) on.
    """

    def __init__(self, config: SchedulerConfig):
        self.goal, self.most = config.tpot_goal, config.max_decode_run
        self._seconds: dict[Kind, float] = {}
        self._run = self.most

    def prefill_is_due(self) -> bool:
        """Return whether enough decode steps have run since the last other step."""
        return self._run >= self.decode_run()

    def decode_run(self) -> int:
        """Return the number of decode steps that keep the goal; one while nothing was measured."""
        decode = self._seconds.get("decode")
        others = [self._seconds[kind] for kind in ("encode", "prefill") if kind in self._seconds]
        if decode is None or not others:
            return 1
        if decode >= self.goal:
            return self.most
        return min(max(math.ceil(max(others) / (self.goal - decode)), 1), self.most)

    def planned(self, kind: Kind) -> None:
        """Count a step that was given out."""
        self._run = self._run + 1 if kind == "decode" else 0

    def took(self, kind: Kind, seconds: float) -> None:
        """Learn how long a step took."""
        before = self._seconds.get(kind, seconds)
        self._seconds[kind] = before + _WEIGHT * (seconds - before)


class AnswerLengths:
    """The share of their limit that answers are expected to take."""

    def __init__(self, config: SchedulerConfig):
        self.most, self.ratio = config.reserve_tokens, config.answer_ratio

    def expected(self, left: int) -> int:
        """Return how many more tokens to count with, for an answer that may have so many more."""
        return math.ceil(min(left, self.most) * self.ratio)

    def ended(self, answered: int, limit: int) -> None:
        """Learn how long an answer was."""
        share = min(answered / min(limit, self.most), 1)
        self.ratio = max(self.ratio + _WEIGHT * (share - self.ratio), _LEAST_RATIO)

    def preempted(self) -> None:
        """Learn that too much was admitted."""
        self.ratio = min(self.ratio * 1.2 + 0.02, 1)

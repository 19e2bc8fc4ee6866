"""What the scheduler learns while it runs: how long steps take, and how long answers get."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

from jvlm.inference.scheduling.config import SchedulerConfig

_WEIGHT = 0.1  # of the newest observation
_REMEMBERED = 5  # times of a kind of step; their median counts, which a compilation among them does not change
_LEAST_RATIO = 0.1

Kind = Literal["encode", "prefill", "decode"]


class Pace:
    """How many decode steps run between two steps of prefill (or encode), so that decoding keeps its goal.

    With times p of such a step and d of a decode step, a token takes (p + k d) / k seconds when k decode steps follow:
    at most the goal from k = p / (goal - d) on.
    """

    def __init__(self, config: SchedulerConfig):
        self.goal, self.most = config.tpot_goal, config.max_decode_run
        self.steps, self.seconds = config.decode_steps, config.decode_seconds
        self._times: dict[Kind, deque[float]] = {}
        self._run = self.most

    def prefill_is_due(self) -> bool:
        """Return whether enough decode steps have run since the last other step."""
        return self._run >= self.decode_run()

    def decode_run(self) -> int:
        """Return the number of decode steps that keep the goal; one while nothing was measured."""
        decode = self._seconds("decode")
        others = [self._seconds(kind) for kind in ("encode", "prefill") if kind in self._times]
        if decode is None or not others:
            return 1
        if decode >= self.goal:
            return self.most
        return min(max(math.ceil(max(others) / (self.goal - decode)), 1), self.most)

    def plan_steps(self, waits: bool) -> int:
        """Return how many steps a decoding plan takes.

        Args:
          waits: a prefill or encode follows as soon as enough decode steps have run.
        """
        decode = self._seconds("decode")
        if decode is None:
            return 1
        most = self.steps if decode * self.steps <= self.seconds else int(self.seconds / decode)
        if waits:
            most = min(most, self.decode_run() - self._run)
        return max(most, 1)

    def planned(self, kind: Kind, steps: int = 1) -> None:
        """Count steps that were given out."""
        self._run = self._run + steps if kind == "decode" else 0

    def took(self, kind: Kind, seconds: float) -> None:
        """Learn how long a step took."""
        self._times.setdefault(kind, deque(maxlen=_REMEMBERED)).append(seconds)

    def _seconds(self, kind: Kind) -> float | None:
        times = self._times.get(kind)
        return None if times is None else statistics.median(times)


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

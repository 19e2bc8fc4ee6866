"""What the scheduler learns while it runs: how long steps take, and how long answers get."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from typing import Literal

from jvlm.inference.scheduling.config import SchedulerConfig

_WEIGHT = 0.1  # of the newest observation
_REMEMBERED = 5  # times of a kind of step; their median counts, which a compilation among them does not change
_LEAST_RATIO = 0.1

Kind = Literal["encode", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What waits for its first token, and has its place already.

    Attributes:
      tokens: of prompts that are not computed.
      waiting: answers to these.
      decoding: answers that are drawn meanwhile.
      fullness: what share they are of the chunks, or of the pages of earlier tokens, that one prefill takes.
      pictures: whether some of them need an encode first.
    """

    tokens: int
    waiting: int
    decoding: int
    fullness: float
    pictures: bool

    @property
    def share(self) -> float:
        """The share of all these answers that a decode step leaves out."""
        return self.waiting / (self.waiting + self.decoding)


class Pace:
    """Whether prompts are computed next, or tokens of answers.

    Times are p of a prefill, with an encode where one comes before it, and d of a decode step; w answers wait for their
    prompts and r are drawn.

    With a goal of seconds between tokens, k decode steps run between two steps of prompts. A token then takes
    (p + k d) / k seconds: at most the goal from k = p / (goal - d) on. k is no larger than p / d, from where on a token
    takes at most twice as long as without prompts, and than p r / (d w), where the answers that wait lose as much time
    as those that are drawn.

    Without a goal, as many tokens as possible: a decode step that w of w + r answers miss wastes the share w / (w + r)
    of it, and a prefill wastes what it could have computed besides. Prompts come first as soon as the former is as much
    as the latter, which wastes at most twice as much as knowing beforehand when new prompts come (ski rental).
    """

    def __init__(self, config: SchedulerConfig):
        self.goal, self.sizes = config.tpot_goal, config.prefill_tokens
        self.steps, self.seconds = config.decode_steps, config.decode_seconds
        self._times: dict[Kind, deque[float]] = {}
        self._run = 0  # decode steps since the last step of prompts
        self._wasted = 0.0  # seconds of those steps that waiting answers missed

    def prompts_are_due(self, prompts: Prompts) -> bool:
        """Return whether a step of prompts comes before a decode step."""
        return self._steps_until(prompts) <= 0

    def plan_steps(self, prompts: Prompts | None) -> int:
        """Return how many steps a decoding plan takes.

        Args:
          prompts: that follow as soon as they are due.
        """
        decode = self._seconds("decode")
        if decode is None:
            return 1
        most = self.steps if decode * self.steps <= self.seconds else int(self.seconds / decode)
        if prompts is not None:
            most = min(most, self._steps_until(prompts))
        return max(most, 1)

    def planned(self, kind: Kind, steps: int = 1, prompts: Prompts | None = None) -> None:
        """Count steps that were given out, while prompts waited."""
        if kind == "decode":
            self._run += steps
            if prompts is not None:
                self._wasted += steps * (self._seconds("decode") or 0.0) * prompts.share
        elif kind == "prefill":
            self._run, self._wasted = 0, 0.0

    def took(self, kind: Kind, seconds: float) -> None:
        """Learn how long a step took."""
        self._times.setdefault(kind, deque(maxlen=_REMEMBERED)).append(seconds)

    def _steps_until(self, prompts: Prompts) -> int:
        """Return how many decode steps run before prompts are due."""
        decode = self._seconds("decode")
        if decode is None or "prefill" not in self._times:
            return 1 - self._run
        kinds: tuple[Kind, ...] = ("encode", "prefill") if prompts.pictures else ("prefill",)
        prefill = sum(self._seconds(kind) or 0.0 for kind in kinds)
        if self.goal is None:
            size = next((size for size in self.sizes if size >= prompts.tokens), self.sizes[-1])
            unused = 1 - min(max(prompts.tokens / size, prompts.fullness), 1.0)
            left = prefill * unused - self._wasted
            return math.ceil(left / (decode * prompts.share))
        least = prefill / decode * min(1.0, prompts.decoding / prompts.waiting)
        if decode < self.goal:
            least = min(least, prefill / (self.goal - decode))
        return max(math.ceil(least), 1) - self._run

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

"""Rewards of stored answers, computed again: with the run's own rewards a proof, with others a trial of them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from pathlib import Path

from jvlm.rl.rewards.router import Router
from jvlm.rl.rollout_files import read_groups
from jvlm.scoring.score import Score

_BATCH = 256  # answers that are judged together
_LISTED = 20  # differences of a task


@dataclasses.dataclass
class Rescored:
    """What became of the answers of a task.

    Attributes:
      equal, different: answers whose reward and reason are the stored ones, and whose are others.
      before, after: rewards that are not missing.
      differences: the first of them, as lines.
    """

    equal: int = 0
    different: int = 0
    before: list[float] = dataclasses.field(default_factory=list)
    after: list[float] = dataclasses.field(default_factory=list)
    differences: list[str] = dataclasses.field(default_factory=list)

    def line(self, task: str) -> str:
        """Return the result as one line."""
        means = (f"{statistics.fmean(one):.6f}" if one else "none" for one in (self.before, self.after))
        stored, now = means
        return (
            f"{task}: {self.equal} of {self.equal + self.different} rewards are the stored ones; mean {stored} stored, "
            f"{now} now"
        )


def rescore(folder: Path, router: Router, only: Iterable[int] | None = None) -> dict[str, Rescored]:
    """Return what each task's rewards are now.

    Args:
      folder: ``rollouts`` of a run.
      only: steps; None takes all.

    Raises:
      UserError: a task without a reward, an image that is gone, a damaged file.
    """
    found: dict[str, Rescored] = {}
    waiting = []
    for stored in read_groups(folder, only):
        waiting += list(zip(stored.items(folder), stored.group.answers, strict=True))
        if len(waiting) >= _BATCH:
            _compare(waiting, router, found)
            waiting = []
    _compare(waiting, router, found)
    return found


def _compare(waiting: list, router: Router, found: dict[str, Rescored]) -> None:
    scores: list[Score] = router.scores([item for item, _ in waiting])
    for (item, answer), score in zip(waiting, scores, strict=True):
        result = found.setdefault(item.task, Rescored())
        for values, value in ((result.before, answer.reward), (result.after, score.value)):
            if value is not None:
                values.append(value)
        if (answer.reward, answer.reason) == (score.value, score.reason):
            result.equal += 1
            continue
        result.different += 1
        if len(result.differences) < _LISTED:
            result.differences.append(
                f"{item.id}: {answer.reward} ({answer.reason}) is {score.value} ({score.reason}) now: {answer.text!r}"
            )

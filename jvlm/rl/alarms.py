"""Signs that a policy learns something else than it should: what is looked at, what is said, and what ends a run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jvlm.errors import UserError
from jvlm.validation import check_fields

Name = Literal["hacking", "truncated", "entropy", "mismatch", "missing", "reason", "boxes", "useless", "length"]


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
    """What raises an alarm. An alarm is a line on the terminal and in the log; those of ``stop`` end the run.

    Attributes:
      stop: alarms that end the run: "hacking", "truncated", "entropy", "mismatch", "missing", "reason", "boxes",
        "useless", "length".
      hacking_evaluations: "hacking": the reward of a task rose and its held-out reward fell, so many times in a row.
      truncated: "truncated": largest share of answers that are cut.
      entropy: "entropy": least entropy, as a share of that of the first step.
      mismatch: "mismatch": most that the trainer's distribution may be away from the engine's ("rollout/kl3").
      missing: "missing": largest share of rewards that are missing.
      reason: "reason": largest share of one reason for a reward of a task, other than "ok" and "wrong".
      boxes: "boxes": most boxes in an answer for each that is expected, on average.
      length: "length": most that answers may be longer than in the first step, on average.
    """

    stop: tuple[Name, ...] = ("mismatch",)
    hacking_evaluations: int = 3
    truncated: float = 0.3
    entropy: float = 0.1
    mismatch: float = 0.01
    missing: float = 0.01
    reason: float = 0.5
    boxes: float = 2.0
    length: float = 4.0

    def __post_init__(self):
        shares = dict.fromkeys(("truncated", "entropy", "missing", "reason"), "[0, 1]")
        positive = dict.fromkeys(("mismatch", "boxes"), "(0, inf)")
        check_fields(
            self, "task.alarms.", {**shares, **positive, "length": "(1, inf)", "hacking_evaluations": "[1, inf)"}
        )


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A sign that something goes wrong.

    Attributes:
      text: with both numbers, and what to look at.
      ends: whether it ends the run.
    """

    name: Name
    text: str
    ends: bool


class Alarms:
    """Watches the log of a run. What it remembers is plain values, and goes into checkpoints.

    Args:
      state: of `state`, to go on from.
    """

    def __init__(self, config: AlarmConfig, state: Mapping[str, Any] | None = None):
        self._config = config
        state = state or {"first": {}, "sums": {}, "evaluations": [], "raised": []}
        self._first: dict[str, float] = dict(state["first"])
        self._sums: dict[str, list[float]] = {task: list(one) for task, one in state["sums"].items()}
        self._evaluations: list[dict[str, list[float]]] = list(state["evaluations"])
        self._raised: set[str] = set(state["raised"])

    def state(self) -> dict[str, Any]:
        """Return what `Alarms` goes on from, as JSON values."""
        return {
            "first": dict(self._first),
            "sums": dict(self._sums),
            "evaluations": list(self._evaluations),
            "raised": sorted(self._raised),
        }

    def check(self, values: Mapping[str, float]) -> list[Alarm]:
        """Return the alarms that a step raises; one that stays is raised once.

        Args:
          values: of the step, by their names in the log.
        """
        for name in ("entropy", "length/mean"):
            if math.isfinite(values.get(name, math.nan)):
                self._first.setdefault(name, values[name])
        for name, value in values.items():
            if (task := _task_of(name)) is not None and math.isfinite(value):
                total = self._sums.setdefault(task, [0.0, 0.0])
                total[0], total[1] = total[0] + value, total[1] + 1
        return self._new(self._signs(values), kept={"hacking"})

    def evaluated(self, values: Mapping[str, float]) -> list[Alarm]:
        """Return the alarms that held-out rewards raise ("reward/TASK"), beside the rewards since the last of them."""
        pairs = {}
        for name, value in values.items():
            task = _task_of(name)
            if task is not None and task in self._sums and math.isfinite(value):
                total, count = self._sums[task]
                pairs[task] = [total / count, value]
        self._sums = {task: total for task, total in self._sums.items() if task not in pairs}
        self._evaluations = [*self._evaluations, pairs][-(self._config.hacking_evaluations + 1) :]
        found = {}
        for task in pairs:
            series = [one[task] for one in self._evaluations if task in one]
            if len(series) > self._config.hacking_evaluations and _part(series):
                (sampled, held_out), (later, later_held_out) = series[0], series[-1]
                found[f"hacking {task}"] = (
                    f"the reward of {task} rose from {sampled:.4g} to {later:.4g}, and the held-out one fell from "
                    f"{held_out:.4g} to {later_held_out:.4g}: the policy learns something that the reward likes and "
                    "the task does not; look at samples.html"
                )
        return self._new(found, kept=self._raised_but("hacking"))

    def _raised_but(self, kind: str) -> set[str]:
        return {sign.partition(" ")[0] for sign in self._raised} - {kind}

    def _new(self, signs: Mapping[str, str], kept: set[str]) -> list[Alarm]:
        """Return the alarms of signs that were not there before; those of kinds that were not looked at stay."""
        alarms = []
        for sign, text in signs.items():
            if sign not in self._raised:
                name: Any = sign.partition(" ")[0]
                alarms.append(Alarm(name, text, name in self._config.stop))
        self._raised = set(signs) | {sign for sign in self._raised if sign.partition(" ")[0] in kept}
        return alarms

    def _signs(self, values: Mapping[str, float]) -> dict[str, str]:
        config, found = self._config, {}
        if (cut := values.get("truncated_share", 0.0)) > config.truncated:
            found["truncated"] = (
                f"{cut:.0%} of the answers are cut at the longest length, more than {config.truncated:.0%}: give "
                "task.rollout.max_tokens more, or look whether answers repeat themselves"
            )
        entropy, first = values.get("entropy"), self._first.get("entropy")
        if entropy is not None and first and entropy < config.entropy * first:
            found["entropy"] = (
                f"the entropy of a token is {entropy:.3g} nats, and was {first:.3g} at first: answers are all alike, "
                "and give no gradient; lower the learning rate, or raise the temperature"
            )
        length, start = values.get("length/mean"), self._first.get("length/mean")
        if length is not None and start and length > config.length * start:
            found["length"] = (
                f"answers have {length:.0f} tokens, and had {start:.0f} at first: look whether length is rewarded, and "
                "at task.advantage.overlong_margin"
            )
        if (away := values.get("rollout/kl3", 0.0)) > config.mismatch:
            found["mismatch"] = (
                f"the trainer's distribution is {away:.3g} away from the engine's (rollout/kl3), more than "
                f"{config.mismatch:g}: the step would learn from the difference; set task.policy_loss.correction, and "
                "see whether both compute in the same precision"
            )
        if not values.get("valid_share", 1.0):
            found["useless"] = "no group of the step has rewards that differ: nothing is learnt; look at pass_rate/"
        return found | self._of_tasks(values)

    def _of_tasks(self, values: Mapping[str, float]) -> dict[str, str]:
        config, found = self._config, {}
        for name, value in values.items():
            head, _, reason = name.partition("/reason/")
            task = head.removeprefix("reward/")
            if reason == "service_error" and value > config.missing:
                found[f"missing {task}"] = (
                    f"{value:.0%} of the rewards of {task} are missing, more than {config.missing:.0%}: look at the "
                    "service or the judge that gives them"
                )
            elif reason not in ("", "ok", "wrong", "service_error") and value > config.reason:
                found[f"reason {task}"] = (
                    f"{value:.0%} of the rewards of {task} have the reason {reason!r}: look whether answers have the "
                    "form that the reward reads"
                )
            if name.startswith("boxes/") and value > config.boxes:
                task = name.removeprefix("boxes/")
                found[f"boxes {task}"] = (
                    f"answers to {task} have {value:.1f} boxes for each that is expected: boxes that are guessed; look "
                    "at the reward"
                )
        return found


def _part(series: Sequence[Sequence[float]]) -> bool:
    """Whether the first of each pair rises and the second falls, from each pair to the next."""
    return all(later[0] > one[0] and later[1] < one[1] for one, later in itertools.pairwise(series))


def _task_of(name: str) -> str | None:
    """Return the task of "reward/TASK"; None for other names."""
    head, _, task = name.partition("/")
    return task if head == "reward" and task and "/" not in task else None


def stopped(alarms: Sequence[Alarm]) -> None:
    """Raise UserError if one of the alarms ends the run."""
    if ending := [alarm for alarm in alarms if alarm.ends]:
        raise UserError(f"{ending[0].text} (task.alarms.stop names {ending[0].name!r})")

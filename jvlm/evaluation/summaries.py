"""How the scores of questions become the score of a task, and how sure it is."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jvlm.scoring.benchmarks import reasoning
from jvlm.scoring.statistics import Interval, mean_interval, wilson

_DRAWS = 500
UNREAD = frozenset(("unparsed", "empty", "thinking_only", "several_answers", "contradiction", "wrong_format"))
NO_JUDGMENT = frozenset(("judge_failed", "judge_unparsed"))  # reasons of a judge; such answers have no score


@dataclasses.dataclass(frozen=True)
class Scored:
    """The score of one answer.

    Attributes:
      value: from 0 to 1; None where there is none, which is left out of means and counted.
    """

    id: str
    run: int
    value: float | None
    reason: str
    finish: str
    group: str
    categories: Mapping[str, str]
    facts: Mapping[str, Any]
    parsed: Any = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0

    @property
    def unit(self) -> str:
        """What is drawn as one when an interval is estimated."""
        return self.group or self.id


Summary = Callable[[Sequence[Scored]], float]


def mean(scored: Sequence[Scored]) -> float:
    """Return the mean over answers."""
    return float(np.mean([one.value for one in scored]))


def macro(kind: str) -> Summary:
    """Return the mean of the means of categories."""

    def summary(scored: Sequence[Scored]) -> float:
        parts: dict[str, list[float]] = defaultdict(list)
        for one in scored:
            parts[one.categories.get(kind, "")].append(float(one.value or 0))
        return float(np.mean([np.mean(values) for values in parts.values()]))

    return summary


def worst_case(scored: Sequence[Scored]) -> float:
    """Return the share of groups in which all is right."""
    return reasoning.worst_case((one.group, float(one.value or 0)) for one in scored)


def wemath(scored: Sequence[Scored]) -> float:
    """Return WeMath's strict score; problems are groups of a composed question and its steps."""
    problems: dict[str, dict[str, Any]] = defaultdict(lambda: {"composed": None, "steps": []})
    for one in scored:
        if one.facts.get("composed"):
            problems[one.group]["composed"] = float(one.value or 0)
        else:
            problems[one.group]["steps"].append(float(one.value or 0))
    whole = [problem for problem in problems.values() if problem["composed"] is not None and problem["steps"]]
    return reasoning.wemath(whole).strict


def mme(scored: Sequence[Scored]) -> float:
    """Return MME's score over its maximum, 2800: accuracy of questions, and of images with both right, by category."""
    parts: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        parts[one.categories.get("category", "")].append(one)
    both = [(mean(part) + worst_case(part)) / 2 for part in parts.values()]
    return float(np.mean(both))


def f1(scored: Sequence[Scored]) -> float:
    """Return F1 of the questions whose answer is yes (``facts["positive"]``); an answer that is not read is wrong."""
    right = sum(float(one.value or 0) for one in scored if one.facts["positive"])
    wrong = sum(1 - float(one.value or 0) for one in scored)
    return 2 * right / (2 * right + wrong) if right else 0.0


SUMMARIES: Mapping[str, Summary] = {
    "mean": mean,
    "macro_group": macro("group"),
    "macro_task_type": macro("task_type"),
    "macro_category": macro("category"),
    "worst_case": worst_case,
    "wemath": wemath,
    "mme": mme,
    "f1": f1,
}


def interval(scored: Sequence[Scored], name: str = "mean") -> Interval | None:
    """Return a task's score with its 95 % interval; None where nothing has a score."""
    counted = [one for one in scored if one.value is not None]
    if not counted:
        return None
    units = [one.unit for one in counted]
    values = {one.value for one in counted}
    if len(values) == 1 and SUMMARIES[name](counted) in values & {0.0, 1.0}:
        # no draw differs from another: what is sure is how many groups were seen
        return wilson(len(set(units)) if values == {1.0} else 0, len(set(units)))
    if name == "mean":
        groups = units if len(set(units)) < len(units) else None
        return mean_interval(np.array([one.value for one in counted]), groups=groups)
    summary = SUMMARIES[name]
    by_unit: dict[str, list[Scored]] = defaultdict(list)
    for one in counted:
        by_unit[one.unit].append(one)
    parts, rng = list(by_unit.values()), np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWS):
        again = []
        for copy, number in enumerate(rng.integers(0, len(parts), len(parts))):
            # a group that is drawn twice is two groups
            again += [dataclasses.replace(one, group=f"{copy}/{one.unit}") for one in parts[number]]
        drawn.append(summary(again))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(summary(counted), float(low), float(high))


def by_category(scored: Sequence[Scored]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the mean, interval and number of answers of each category, by kind."""
    parts: dict[str, dict[str, list[Scored]]] = defaultdict(lambda: defaultdict(list))
    for one in scored:
        for kind, name in one.categories.items():
            parts[kind][name].append(one)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind, names in parts.items():
        found[kind] = {}
        for name, part in sorted(names.items()):
            own = interval(part)
            if own:
                found[kind][name] = {"value": own.value, "low": own.low, "high": own.high, "answers": len(part)}
    return found


def counts(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return how many answers there are, and how many could not be read, were cut, or failed."""
    reasons = Counter(one.reason for one in scored)
    return {
        "answers": len(scored),
        "scored": sum(one.value is not None for one in scored),
        "unparsed": sum(reasons[reason] for reason in UNREAD),
        "truncated": sum(one.finish == "length" for one in scored),
        "failed": reasons["failed_request"],
        "reasons": dict(sorted(reasons.items())),
    }

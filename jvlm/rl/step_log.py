"""What a step of policy optimisation says of itself: rewards, pass rates, lengths, ages of the groups that it judged.

All of it is a function of the groups, so it can be computed again from those that are stored.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jvlm.rl import shaping
from jvlm.rl.records import AnswerRecord, GroupRecord
from jvlm.rl.rollouts import is_useful

RIGHT = 0.5  # least reward of an answer that counts as right, where lengths of right and wrong ones are told apart
# upper ends of the pass rate's bars; a bar holds its upper end, and the first is 0 alone
_BARS = (*(f"{n / 8:g}" for n in range(8)), "below_1", "1")


def values_of(
    groups: Sequence[GroupRecord], perfect: Mapping[str, float] = {}, golds: Mapping[int, Any] = {}
) -> dict[str, float]:
    """Return what the log says of the groups that a step judged. Means are over answers unless a name says otherwise.

    - "reward": raw; "reward/TASK", "/std", "/shaped" (of groups that the step trains on), "/unparsed" (share),
      "/reason/REASON" (shares), "/missing" (count), "/seconds_p99" (of a group's rewards).
    - "pass_rate/TASK/BAR": share of groups whose mean reward is 0, up to 0.125, ... up to 0.875, below 1, 1.
    - "valid_share", "perfect_share", "zero_share": of groups whose rewards differ; are all perfect; are all 0.
      "easy_share": of groups that were drawn from the easy prompts.
    - "length/mean", "/p50", "/p95", "/right", "/wrong", "truncated_share", "repetition_share" (3-grams of tokens that
      were there before), "distinct_share" (different answers in a group), "stop_token/ID" (share of the answers).
    - "entropy": of a token, in nats; "advantage_abs"; "gradient/groups/TASK", "gradient/tokens/TASK": what a step
      trains on.
    - "age_max", "age_mean": updates between the weights that drew a token and those of the step.
    - "boxes/TASK": boxes in an answer, over boxes that are expected.

    Args:
      perfect: least reward of an answer that cannot be better, by task; others 1.
      golds: what is right, by the serial number of the group.
    """
    asked = [group for group in groups if group.answers]
    answers = [answer for group in asked for answer in group.answers]
    values = {"reward": _mean(_rewards(answers))}
    for task in sorted({group.task for group in asked}):
        values |= _of_task(task, [group for group in asked if group.task == task])
    ends = {group.serial: perfect.get(group.task, 1.0) for group in asked}
    full = [group for group in asked if None not in group.rewards]
    values |= {
        "valid_share": _share(is_useful(group) for group in groups),
        "perfect_share": _share(group in full and min(group.rewards) >= ends[group.serial] for group in asked),
        "zero_share": _share(group in full and max(group.rewards) <= 0 for group in asked),
        "easy_share": _share(group.from_pool for group in groups),
    }
    return values | _lengths(asked, answers) | _policy(asked, golds)


def _of_task(task: str, groups: Sequence[GroupRecord]) -> dict[str, float]:
    answers = [answer for group in groups for answer in group.answers]
    rewards, name = _rewards(answers), f"reward/{task}"
    shaped = [answer.shaped for answer in answers if answer.shaped is not None]
    reasons = collections.Counter(answer.reason for answer in answers)
    values = {
        name: _mean(rewards),
        f"{name}/std": statistics.pstdev(rewards) if rewards else math.nan,
        f"{name}/unparsed": reasons["unparsed"] / len(answers),
        f"{name}/missing": float(len(answers) - len(rewards)),
        f"{name}/seconds_p99": float(np.quantile([group.judge_seconds for group in groups], 0.99)),
        **({f"{name}/shaped": _mean(shaped)} if shaped else {}),
        **{f"{name}/reason/{reason}": count / len(answers) for reason, count in sorted(reasons.items())},
    }
    rates = [statistics.fmean(own) for group in groups if (own := _rewards(group.answers))]
    bars = collections.Counter(map(_bar, rates))
    values |= {f"pass_rate/{task}/{bar}": bars[bar] / len(rates) for bar in _BARS if rates}
    return values


def _bar(rate: float) -> str:
    if rate >= 1:
        return "1"
    return "below_1" if rate > 7 / 8 else f"{math.ceil(rate * 8) / 8:g}"


def _lengths(groups: Sequence[GroupRecord], answers: Sequence[AnswerRecord]) -> dict[str, float]:
    if not answers:
        return {}
    lengths = [len(answer.tokens) for answer in answers]
    right = [len(a.tokens) for a in answers if a.reward is not None and a.reward >= RIGHT]
    wrong = [len(a.tokens) for a in answers if a.reward is not None and a.reward < RIGHT]
    ends = collections.Counter(answer.tokens[-1] for answer in answers if answer.tokens and not answer.truncated)
    return {
        "length/mean": statistics.fmean(lengths),
        "length/p50": float(np.quantile(lengths, 0.5)),
        "length/p95": float(np.quantile(lengths, 0.95)),
        **({"length/right": statistics.fmean(right)} if right else {}),
        **({"length/wrong": statistics.fmean(wrong)} if wrong else {}),
        "truncated_share": _share(answer.truncated for answer in answers),
        "repetition_share": statistics.fmean(-shaping.repetition(answer.tokens) for answer in answers),
        "distinct_share": statistics.fmean(len({a.tokens for a in g.answers}) / len(g.answers) for g in groups),
        **{f"stop_token/{token}": count / len(answers) for token, count in sorted(ends.items())},
    }


def _policy(groups: Sequence[GroupRecord], golds: Mapping[int, Any]) -> dict[str, float]:
    entropies = [value for group in groups for answer in group.answers for value in answer.entropies]
    trained = [group for group in groups if group.selected]
    values = {"entropy": _mean(entropies)} if entropies else {}
    advantages = [abs(a.advantage) for group in trained for a in group.answers if a.advantage is not None]
    if advantages:
        values["advantage_abs"] = statistics.fmean(advantages)
    for task in sorted({group.task for group in trained}):
        own = [group for group in trained if group.task == task]
        values[f"gradient/groups/{task}"] = float(len(own))
        values[f"gradient/tokens/{task}"] = float(sum(len(a.tokens) for group in own for a in group.answers))
        if (boxes := _boxes(own, golds)) is not None:
            values[f"boxes/{task}"] = boxes
    return values


def ages_of(groups: Iterable[GroupRecord], version: int) -> dict[str, float]:
    """Return how many updates lie between the weights that drew a token and those with ``version`` updates."""
    ages = [version - drawn for group in groups if group.selected for a in group.answers for drawn in a.versions]
    return {"age_max": float(max(ages)), "age_mean": statistics.fmean(ages)} if ages else {}


def _boxes(groups: Sequence[GroupRecord], golds: Mapping[int, Any]) -> float | None:
    """Return how many boxes answers have for each that is expected; None where answers are no lists of boxes."""
    shares = []
    for group in groups:
        gold = golds.get(group.serial)
        if gold and _are_boxes(gold):
            shares += [len(a.parsed) / len(gold) for a in group.answers if _are_boxes(a.parsed)]
    return statistics.fmean(shares) if shares else None


def _are_boxes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, list | tuple) and len(one) == 4 for one in value)


def _rewards(answers: Iterable[AnswerRecord]) -> list[float]:
    return [answer.reward for answer in answers if answer.reward is not None]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _share(flags: Iterable[bool]) -> float:
    listed = list(flags)
    return sum(listed) / len(listed) if listed else 0.0

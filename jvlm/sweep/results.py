"""What the runs of a sweep reached: their scores question by question, and their losses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Float
from scipy import stats

from jvlm.errors import UserError
from jvlm.scoring.statistics import Interval, compare, mean_interval
from jvlm.sweep.trials import SEED, Trial

ANSWERS, LOG = "answers.jsonl", "logging.jsonl"
# metric -> whether more is better
METRICS = {"accuracy": True, "mean_iou": True, "eval_loss": False, "eval_token_acc": True, "loss": False}
SCORE = "score/"  # before a task's name: its mean score, where questions are of several tasks
_LAST = 0.1  # share of the log lines, at its end, whose mean is the training loss

Question = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What one run reached.

    Attributes:
      values: metric -> value.
      questions: metric -> question (file, number, turn) -> score, of the metrics that are means over questions.
    """

    values: Mapping[str, float]
    questions: Mapping[str, Mapping[Question, float]]


@dataclasses.dataclass(frozen=True)
class Change:
    """The difference of a setting to the first one.

    Attributes:
      interval: 95 % interval of the difference.
      detectable: smallest true difference that would show in 80 % of cases.
      over: what it is over. "runs": differences of runs with the same seed, Student's. "questions": scores of the same
        questions, where there is one run of each; it says nothing of what another seed would give.
    """

    interval: Interval
    detectable: float
    over: Literal["runs", "questions"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed only, and one metric of theirs.

    Attributes:
      settings: the varied fields and values that the runs share.
      runs: how many have the metric.
      interval: the mean over runs. With several runs the 95 % interval is Student's over runs; with one, it is over
        the questions; None where there is neither.
      change: None for the first setting, and where there is nothing to compare by.
    """

    settings: tuple[tuple[str, str], ...]
    runs: int
    mean: float
    interval: Interval | None
    change: Change | None = None

    @property
    def name(self) -> str:
        return ", ".join(f"{field}={value}" for field, value in self.settings) or "as configured"


def read_run(folder: epath.Path) -> RunResult:
    """Return what a finished run's folder holds. Raises UserError if it holds neither scores nor a log."""
    answers, log = _lines(folder / ANSWERS), _lines(folder / LOG)
    if not answers and not log:
        raise UserError(f"{folder} holds neither {ANSWERS} nor {LOG}: the trial has not run there")
    questions: dict[str, dict[Question, float]] = {}
    several = len({answer["file"] for answer in answers}) > 1
    for answer in answers:
        kind = "mean_iou" if "boxes" in answer else "accuracy"
        for metric in (kind, SCORE + task_of(answer["file"])) if several else (kind,):
            questions.setdefault(metric, {})[answer["file"], answer["number"], answer["turn"]] = answer["score"]
    values = {metric: float(np.mean(list(scores.values()))) for metric, scores in questions.items()}
    for name in ("eval_loss", "eval_token_acc"):
        measured = [line[name] for line in log if line.get(name) is not None]
        if measured:
            values[name] = measured[-1]
    losses = [line["loss"] for line in log if line.get("loss") is not None]
    if losses:
        values["loss"] = float(np.mean(losses[-max(1, round(_LAST * len(losses))) :]))
    return RunResult(values, questions)


def task_of(file: str) -> str:
    """Return the name of a file's task: "data/test_ocr.arrayrecord" is "ocr"."""
    return Path(file).name.partition(".")[0].removeprefix("test_")


def metrics_of(found: Mapping[str, RunResult]) -> list[str]:
    """Return the metrics that some run has: those of all questions and of losses, then of each task."""
    names = dict.fromkeys(name for result in found.values() for name in result.values)
    return [name for name in METRICS if name in names] + sorted(name for name in names if name not in METRICS)


def more_is_better(metric: str) -> bool:
    """Return whether more of a metric is better."""
    return METRICS.get(metric, True)


def _lines(path: epath.Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, on disk or in a store; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def settings_of(found: Mapping[str, RunResult], trials: Sequence[Trial], metric: str) -> list[Setting]:
    """Return one `Setting` for each group of finished trials that have a metric, in the trials' order.

    Args:
      found: slug -> result, of the trials that are finished.
    """
    groups: dict[tuple, dict[str, RunResult]] = {}
    for trial in trials:
        result = found.get(trial.slug)
        if result is not None and metric in result.values:
            groups.setdefault(trial.settings, {})[trial.values.get(SEED, "")] = result
    settings = [_setting(shared, list(results.values()), metric) for shared, results in groups.items()]
    every = list(groups.values())
    return [
        setting if number == 0 else dataclasses.replace(setting, change=_change(every[0], every[number], metric))
        for number, setting in enumerate(settings)
    ]


def _setting(shared: tuple[tuple[str, str], ...], results: Sequence[RunResult], metric: str) -> Setting:
    values = np.array([result.values[metric] for result in results])
    interval = None
    if len(values) > 1:
        interval = _student(values)
    elif metric in results[0].questions:
        interval = mean_interval(np.array(list(results[0].questions[metric].values())))
    return Setting(shared, len(values), float(values.mean()), interval)


def _student(values: Float[np.ndarray, " N"]) -> Interval:
    """Return the mean of several values with Student's 95 % interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def _change(first: Mapping[str, RunResult], second: Mapping[str, RunResult], metric: str) -> Change | None:
    """Return how two settings differ, given as seed -> run."""
    seeds = [seed for seed in first if seed in second]
    if len(seeds) > 1:
        differences = np.array([second[seed].values[metric] - first[seed].values[metric] for seed in seeds])
        deviation, free = differences.std(ddof=1) / np.sqrt(len(seeds)), len(seeds) - 1
        detectable = float((stats.t.ppf(0.975, free) + stats.t.ppf(0.8, free)) * deviation)
        return Change(_student(differences), detectable, "runs")
    one, other = (next(iter(runs.values())).questions.get(metric, {}) for runs in (first, second))
    both = [question for question in one if question in other]
    if len(both) < 2:
        return None
    found = compare(np.array([one[q] for q in both]), np.array([other[q] for q in both]))
    return Change(found.difference, found.detectable, "questions")


def verdict(setting: Setting, metric: str) -> str:
    """Return what the comparison with the first setting shows, in a few words."""
    change = setting.change
    if change is None:
        return ""
    difference = change.interval
    if difference.low == difference.high == 0:
        return "the same"
    if difference.low <= 0 <= difference.high:
        return f"no difference seen over {change.over} (one of {change.detectable:.3g} would show)"
    better = (difference.value > 0) == more_is_better(metric)
    return f"{'better' if better else 'worse'} by {abs(difference.value):.3g} over {change.over}"


def table(found: Mapping[str, RunResult], trials: Sequence[Trial]) -> str:
    """Return the comparison as lines for the terminal, metric by metric."""
    lines: list[str] = []
    for metric in metrics_of(found):
        settings = settings_of(found, trials, metric)
        if not settings:
            continue
        width = max(len(setting.name) for setting in settings)
        lines.append(f"{metric} ({'more' if more_is_better(metric) else 'less'} is better)")
        for setting in settings:
            between = f"{setting.interval.low:.3f} .. {setting.interval.high:.3f}" if setting.interval else ""
            runs = f"{setting.runs} run{'s' if setting.runs > 1 else ''}"
            line = (
                f"  {setting.name:<{width}}  {setting.mean:8.4f}  {between:<16}  {runs:<7}  {verdict(setting, metric)}"
            )
            lines.append(line.rstrip())
    return "\n".join(lines)

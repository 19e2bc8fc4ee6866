"""What runs reached task by task: a task is a file of held-out questions, by which runs are compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvlm.errors import UserError
from jvlm.scoring.statistics import Comparison, Interval, compare, mean_interval
from jvlm.sweep.results import ANSWERS, LOG, task_of
from jvlm.training import log

SCORES = "scores.json"
Key = tuple[int, int]  # number of an example in its file, and turn
_LOSS = "eval_loss/"
# beside the scores, since packing changes them a little
FILL = "% of the tokens, patches of sequences that were no padding"


@dataclasses.dataclass(frozen=True)
class Answered:
    """A line of a run's answers: what was asked, expected and answered, with its score and places."""

    question: str
    expected: str
    response: str
    score: float
    reference: tuple[tuple[float, ...], ...] = ()
    predicted: tuple[tuple[float, ...], ...] = ()

    @property
    def regions(self) -> bool:
        """Whether places are asked for."""
        return bool(self.reference)


@dataclasses.dataclass(frozen=True)
class TaskRun:
    """A finished run.

    Attributes:
      answers: task -> (example, turn) -> answer.
      files: task -> file of its questions, as the run had it.
      log: lines of its log.
      losses: task -> held-out loss of a token, where it was measured.
      seconds: of training; None where nothing says it.
    """

    name: str
    folder: Path
    answers: Mapping[str, Mapping[Key, Answered]]
    files: Mapping[str, str]
    log: Sequence[Mapping[str, Any]]
    losses: Mapping[str, float]
    seconds: float | None


def read(folder: Path) -> TaskRun:
    """Return a run; one that was asked nothing has held-out losses at most.

    Raises:
      UserError: it has neither answers nor a log, or two of its files are of one task.
    """
    if not (folder / ANSWERS).is_file() and not (folder / LOG).is_file():
        raise UserError(f"{folder} has neither {ANSWERS} nor {LOG}: no run was trained there")
    answers, files = _answers(folder / ANSWERS)
    lines = log.read(folder)
    losses = {
        task_of(name.removeprefix(_LOSS)): value
        for line in lines
        for name, value in line.items()
        if name.startswith(_LOSS) and value is not None
    }
    scores = folder / SCORES
    seconds = json.loads(scores.read_text()).get("training_seconds") if scores.is_file() else None
    return TaskRun(folder.name, folder, answers, files, lines, losses, seconds)


def _answers(path: Path) -> tuple[dict[str, dict[Key, Answered]], dict[str, str]]:
    """Return the answers by task, and each task's file; none where there is no file of answers."""
    answers: dict[str, dict[Key, Answered]] = {}
    files: dict[str, str] = {}
    for line in map(json.loads, path.read_text().splitlines() if path.is_file() else ()):
        task = task_of(line["file"])
        if files.setdefault(task, line["file"]) != line["file"]:
            raise UserError(f"{path}: {files[task]} and {line['file']} would both be the task {task}; rename one")
        places = ([tuple(box) for box in line.get(name, ())] for name in ("boxes", "predicted"))
        answers.setdefault(task, {})[line["number"], line["turn"]] = Answered(
            line["question"], line["expected"], line["response"], line["score"], *map(tuple, places)
        )
    return answers, files


def tasks_of(runs: Sequence[TaskRun]) -> list[str]:
    """Return the tasks of runs, in the order in which they come."""
    return list(dict.fromkeys(task for run in runs for task in run.answers))


def score(run: TaskRun, task: str) -> Interval | None:
    """Return a run's mean score of a task with its 95 % interval; questions of an example are drawn together."""
    own = run.answers.get(task)
    if not own:
        return None
    scores = np.array([answer.score for answer in own.values()])
    examples = [number for number, _ in own]
    several = len(set(examples)) < len(examples)
    return mean_interval(scores, groups=examples if several else None)


def change(before: TaskRun, after: TaskRun, task: str) -> Comparison | None:
    """Return how a task's score changed from one run to another, over the questions that both were asked."""
    one, other = before.answers.get(task, {}), after.answers.get(task, {})
    both = [key for key in one if key in other]
    if len(both) < 2:
        return None
    first, second = (np.array([answers[key].score for key in both]) for answers in (one, other))
    return compare(first, second, groups=[number for number, _ in both])


def verdict(found: Comparison) -> str:
    """Return what a change shows, in a few words."""
    difference = found.difference
    if not found.changed:
        return "the same"
    if difference.low <= 0 <= difference.high:
        return f"no change seen (one of {100 * found.detectable:.1f} would show)"
    return "gained" if difference.value > 0 else "lost"


def percent(interval: Interval | None, *, sign: bool = False) -> str:
    """Return an interval in percent: "81.2 [77.0, 85.1]"; empty for none."""
    if interval is None:
        return ""
    value, low, high = (f"{100 * x:{'+' if sign else ''}.1f}" for x in dataclasses.astuple(interval))
    return f"{value} [{low}, {high}]"


def markdown(runs: Sequence[TaskRun]) -> str:
    """Return the table of tasks by runs, and of what the last run changed, as Markdown."""
    tasks = tasks_of(runs)
    lines = [f"| task | questions | {' | '.join(run.name for run in runs)} |", "| --- | ---: |" + " ---: |" * len(runs)]
    for task in tasks:
        count = max(len(run.answers.get(task, ())) for run in runs)
        lines.append(f"| {task} | {count} | {' | '.join(percent(score(run, task)) for run in runs)} |")
    fills = [log.fill(run.log) for run in runs]
    if any(fills):
        cells = (f"{100 * fill.tokens:.1f}, {100 * fill.patches:.1f}" if fill else "" for fill in fills)
        lines.append(f"| {FILL} | | {' | '.join(cells)} |")
    if len(runs) > 1:
        before, after = runs[-2:]
        changes = [(task, found) for task in tasks if (found := change(before, after, task)) is not None]
        if changes:
            lines += ["", f"| task | {after.name} against {before.name} | |", "| --- | ---: | --- |"]
        for task, found in changes:
            lines.append(f"| {task} | {percent(found.difference, sign=True)} | {verdict(found)} |")
    return "\n".join(lines)

"""Two runs of the same tasks, compared question by question."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jvlm.errors import UserError
from jvlm.evaluation.store import SCORE, SCORES, read_lines
from jvlm.json_files import read_object
from jvlm.scoring.statistics import Comparison, compare


@dataclasses.dataclass(frozen=True)
class TaskComparison:
    """How two runs differ on a task.

    Attributes:
      first, second: means over the questions that both answered.
      questions: how many these are.
      left_out: questions with a score in one of them only.
      groups: what is drawn for the interval: questions, or what belongs together (those about one image).
      summary: how the task's own score is made, which is not these means where it is not "mean".
      differing: settings of scoring that differ, which may explain what the models do not.
    """

    task: str
    unit: float
    first: float
    second: float
    questions: int
    left_out: int
    comparison: Comparison
    groups: int = 0
    summary: str = "mean"
    differing: tuple[str, ...] = ()


def compare_folders(first: Path, second: Path) -> list[TaskComparison]:
    """Return how two output folders differ, for each task that both have. Raises UserError if there is none."""
    shared = sorted(
        {p.parent.name for p in first.glob(f"*/{SCORE}")} & {p.parent.name for p in second.glob(f"*/{SCORE}")}
    )
    if not shared:
        raise UserError(f"{first} and {second} have no scored task in common")
    return [_compared(first / name, second / name) for name in shared]


def _compared(first: Path, second: Path) -> TaskComparison:
    records = [read_object(folder / SCORE) for folder in (first, second)]
    values = [_means(folder) for folder in (first, second)]
    both = sorted(values[0].keys() & values[1].keys())
    if not both:
        raise UserError(f"{first} and {second} have no question in common that both answered")
    one, other = (np.array([own[name] for name in both]) for own in values)
    groups = _groups(first)
    units = [groups[name] for name in both]
    differing = tuple(
        f"{field}: {records[0][field]} and {records[1][field]}"
        for field in ("version", "metric", "prompt_hash", "code")
        if records[0][field] != records[1][field]
    )
    return TaskComparison(
        first.name,
        records[0]["unit"],
        float(one.mean()),
        float(other.mean()),
        len(both),
        len(values[0].keys() ^ values[1].keys()),
        compare(one, other, groups=units if len(set(units)) < len(units) else None),
        len(set(units)),
        records[0]["summary"],
        differing,
    )


def _means(folder: Path) -> dict[str, float]:
    """Return the mean over runs of each question that has a score."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in read_lines(folder / SCORES):
        if line["value"] is not None:
            found[line["id"]].append(line["value"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def _groups(folder: Path) -> dict[str, str]:
    """Return what each question belongs to."""
    return {line["id"]: line["group"] or line["id"] for line in read_lines(folder / SCORES)}


def table(compared: Sequence[TaskComparison]) -> str:
    """Return comparisons as lines for the terminal."""
    lines = [f"{'task':<26} {'first':>7} {'second':>7}  {'difference':>10}  {'95 % interval':<16} {'p':>6}  detectable"]
    for one in compared:
        change = one.comparison
        low, high = one.unit * change.difference.low, one.unit * change.difference.high
        lines.append(
            f"{one.task:<26} {one.unit * one.first:7.1f} {one.unit * one.second:7.1f}  "
            f"{one.unit * change.difference.value:+10.1f}  {f'{low:+.1f} .. {high:+.1f}':<16} {change.p_value:6.3f}  "
            f"{one.unit * change.detectable:.1f} with {one.questions} questions"
        )
        if one.groups < one.questions:
            lines.append(f"{'':<26} in {one.groups} groups of questions that belong together, which are drawn as one")
        if one.summary != "mean":
            lines.append(f"{'':<26} means over questions; the task's own score is made otherwise ({one.summary})")
        if one.left_out:
            lines.append(f"{'':<26} {one.left_out} questions have a score in one of them only, and are left out")
        lines += [f"{'':<26} not the same {text}" for text in one.differing]
    lines.append("detectable: the smallest true difference that so many questions show in 80 % of cases")
    return "\n".join(lines)

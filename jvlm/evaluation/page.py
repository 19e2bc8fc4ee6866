"""The report: one HTML page of one or several models' scores, that asks the network for nothing and runs no script."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jvlm.data.view.page import check_target, write
from jvlm.errors import UserError
from jvlm.evaluation.duels import JudgedDuel
from jvlm.evaluation.metrics import METRICS
from jvlm.evaluation.samples import Sample, samples
from jvlm.evaluation.store import SCORE
from jvlm.evaluation.tasks import MEANS_OF_SUITES, SUITES
from jvlm.json_files import read_object

_DUELS = 60


@dataclasses.dataclass(frozen=True)
class Model:
    """The scores of a model: records of tasks, by name, and the folder that has them."""

    name: str
    records: Mapping[str, Mapping[str, Any]]
    folder: Path


def model_of(name: str, folder: Path) -> Model:
    """Return the scores of an output folder. Raises UserError if it has none."""
    records = {path.parent.name: read_object(path) for path in sorted(folder.glob(f"*/{SCORE}"))}
    if not records:
        raise UserError(f"{folder} holds no scores; make them with jvlm evaluate --output {folder}")
    return Model(name, records, folder)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of the page, and each model's answer to it; None of a model that was not asked it."""

    task: str
    id: str
    text: str
    gold: str
    answers: Sequence[Sample | None]


def questions(models: Sequence[Model], tasks: Sequence[str]) -> list[Question]:
    """Return some questions of each task, with the answers of all models."""
    found = []
    for task in tasks:
        own = [model for model in models if task in model.records]
        folders = {model.name: model.folder / task for model in own}
        together: dict[str, dict[str, Sample]] = defaultdict(dict)
        for sample in samples(task, folders, {model.name: model.records[task]["metric"] for model in own}):
            together[sample.id][sample.model] = sample
        for id, answers in together.items():
            first = next(iter(answers.values()))
            found.append(Question(task, id, first.question, first.gold, [answers.get(m.name) for m in models]))
    return found


@dataclasses.dataclass(frozen=True)
class Kind:
    """A choice of a filter: the id of its button, the class of the answers that it shows, and the filter's number."""

    id: str
    css: str
    group: int


def kinds(tasks: int, reasons: int, models: int) -> list[Kind]:
    """Return the choices of all filters."""
    found = [Kind(f"state-{name}", name, 0) for name in ("right", "partly", "wrong", "unscored", "differ")]
    for group, (name, count) in enumerate((("task", tasks), ("reason", reasons), ("model", models)), 1):
        found += [Kind(f"{name}-{number}", f"{name}-{number}", group) for number in range(1, count + 1)]
    return found


def suites(models: Sequence[Model]) -> dict[str, list[float | None]]:
    """Return the plain mean of each suite whose tasks some model has all of, and the means of several suites."""
    found: dict[str, list[float | None]] = {}
    for name, tasks in SUITES.items():
        means = []
        for model in models:
            own = [model.records[task] for task in tasks if task in model.records]
            whole = len(own) == len(tasks) and all(one["value"] is not None for one in own)
            means.append(sum(one["unit"] * one["value"] for one in own) / len(own) if whole else None)
        if any(mean is not None for mean in means):
            found[name] = means
    for name, members in MEANS_OF_SUITES.items():
        parts = [found[member] for member in members if member in found]
        if len(parts) == len(members):
            found[name] = [None if None in column else sum(column) / len(column) for column in zip(*parts, strict=True)]
    return found


@dataclasses.dataclass(frozen=True)
class Group:
    """The mean of a group's tasks whose scores are percentages: (mean, low, high, tasks) of each model, or None."""

    name: str
    bars: Sequence[tuple[float, float, float, Sequence[str]] | None]


def groups(models: Sequence[Model]) -> list[Group]:
    """Return the means of groups of tasks, over the tasks that all models have, with intervals."""
    found = []
    for name in dict.fromkeys(one["group"] for model in models for one in model.records.values()):
        own = [
            {task: one for task, one in model.records.items() if one["group"] == name and _percentage(one)}
            for model in models
        ]
        having = [one for one in own if one]
        if having:
            shared = [task for task in having[0] if all(task in one for one in having)]
            bars = [_mean([one[task] for task in shared], shared) if one and shared else None for one in own]
            found.append(Group(name, bars))
    return found


def _percentage(record: Mapping[str, Any]) -> bool:
    return record["unit"] == 100 and record["value"] is not None


def _mean(records: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> tuple[float, float, float, Sequence[str]]:
    """Return a mean of independent scores, and an interval out of theirs."""
    mean = sum(one["value"] for one in records) / len(records)
    low = math.sqrt(sum((one["value"] - one["interval"][0]) ** 2 for one in records)) / len(records)
    high = math.sqrt(sum((one["interval"][1] - one["value"]) ** 2 for one in records)) / len(records)
    return mean, max(mean - low, 0.0), min(mean + high, 1.0), tasks


def notes(models: Sequence[Model], task: str) -> list[str]:
    """Return what is to be known of a task's scores, each thing once."""
    records = [model.records[task] for model in models if task in model.records]
    judged = [one["judge"].removeprefix("none: ") for one in records if isinstance(one["judge"], str)]
    return [note for note in dict.fromkeys([*(one["note"] for one in records), *judged]) if note]


def measured(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how a score was made, as (what, value)."""
    settings, judge = record["settings"], record["judge"]
    client = settings.get("client", {})
    made = {
        "model": client.get("model") or client.get("url"),
        "weights": client.get("weights"),
        "image processor": client.get("processor") or client.get("boxes"),
        "task": f"{record['task']}, version {record['version']}, summary {record['summary']}, {record['runs']} runs",
        "prompts": f"hash {record['prompt_hash']}, style {settings.get('style')}, {settings.get('shots')} examples",
        "decoding": settings.get("decoding"),
        "parser": settings.get("parser"),
        "judge": f"{judge['model']}, prompt {judge['prompt_hash']}" if isinstance(judge, Mapping) else judge,
        "code": f"jvlm {record['jvlm']}, hash {record['code']}",
        "time": f"{record['seconds']:.0f} s",
        "tokens": f"{record['prompt_tokens']} of prompts, {record['completion_tokens']} of answers",
    }
    return [(name, _words(value)) for name, value in made.items() if value not in (None, "", {})]


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items() if one is not None)
    return str(value)


@dataclasses.dataclass(frozen=True)
class Categories:
    """The scores of a task by one kind of category: (name, score of each model or None), in order of name."""

    task: str
    kind: str
    unit: float
    rows: Sequence[tuple[str, Sequence[Mapping[str, Any] | None]]]


def categories(models: Sequence[Model], tasks: Sequence[str]) -> list[Categories]:
    """Return the scores by category, those of all models side by side; of kinds that have several categories."""
    found = []
    for task in tasks:
        records = [model.records.get(task, {}) for model in models]
        unit = next(float(record["unit"]) for record in records if record)
        for kind in dict.fromkeys(kind for record in records for kind in record.get("categories", {})):
            parts = [record.get("categories", {}).get(kind, {}) for record in records]
            names = sorted({name for part in parts for name in part})
            if len(names) > 1:  # else it says what the table says
                rows = [(name, [part.get(name) for part in parts]) for name in names]
                found.append(Categories(task, kind, unit, rows))
    return found


def render(
    models: Sequence[Model],
    *,
    title: str = "Evaluation",
    elo: Mapping[str, Any] | None = None,
    duels: Sequence[JudgedDuel] = (),
) -> bytes:
    """Return the page.

    Args:
      elo: record of `jvlm.evaluation.duels.record`.
      duels: to show.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jvlm.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tasks = list(dict.fromkeys(task for model in models for task in model.records))
    reasons = sorted({reason for model in models for one in model.records.values() for reason in one["reasons"]})
    asked = questions(models, tasks)
    answers = [answer for question in asked for answer in question.answers if answer is not None]
    page = environment.get_template("page.html.jinja").render(
        title=title,
        models=models,
        tasks=tasks,
        groups=list(dict.fromkeys(one["group"] for model in models for one in model.records.values())),
        means=groups(models),
        notes={task: notes(models, task) for task in tasks},
        measured=[(task, m.name, measured(m.records[task])) for task in tasks for m in models if task in m.records],
        suites=suites(models),
        categories=categories(models, tasks),
        reasons=reasons,
        about={name: metric.about for name, metric in METRICS.items()},
        questions=asked,
        has_regions=any(answer.boxes or answer.points or answer.polygons for answer in answers),
        kinds=kinds(len(tasks), len(reasons), len(models)),
        elo=elo,
        duels=_shown_duels(duels),
        duels_in_all=len(duels),
    )
    return page.encode("utf-8", "backslashreplace")


def _shown_duels(duels: Sequence[JudgedDuel]) -> list[JudgedDuel]:
    """Return the duels to show: in turns one of each task, pair of models and result."""
    groups: dict[tuple[Any, ...], list[JudgedDuel]] = defaultdict(list)
    for duel in duels:
        groups[duel.task, duel.first, duel.second, duel.result].append(duel)
    turns = itertools.zip_longest(*groups.values())
    return [duel for turn in turns for duel in turn if duel is not None][:_DUELS]


def write_page(target: Path, page: bytes) -> None:
    """Write the page. Raises UserError for a target that is something else than a page."""
    check_target(target)
    write(target, page)

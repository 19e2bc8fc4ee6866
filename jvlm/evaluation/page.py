"""The report: one HTML page of one or several models' scores, that asks the network for nothing and runs no script."""

from __future__ import annotations

import base64
import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jvlm.data.view.page import check_target, write
from jvlm.errors import UserError
from jvlm.evaluation.duels import JudgedDuel
from jvlm.evaluation.metrics import METRICS
from jvlm.evaluation.store import SCORE, SCORES, AnswerStore, Stored, read_lines
from jvlm.evaluation.tasks import MEANS_OF_SUITES, SUITES
from jvlm.evaluation.thumbnails import path_of
from jvlm.json_files import read_object
from jvlm.scoring.answers import spoken

_SAMPLES = 12  # of each task and model
_LONGEST = 600  # characters of a shown answer
_DUELS = 60


@dataclasses.dataclass(frozen=True)
class Sample:
    """An answer as the page shows it.

    Attributes:
      state: "right", "partly", "wrong", or "unscored".
      boxes: of the reference and of the answer, in shares of the picture.
      points: the same of points.
    """

    id: str
    task: str
    model: str
    question: str
    answer: str
    gold: str
    value: float | None
    reason: str
    state: str
    picture: str = ""
    size: tuple[int, int] = (1, 1)
    boxes: tuple[tuple[str, tuple[float, float, float, float]], ...] = ()
    points: tuple[tuple[str, tuple[float, float]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """The scores of a model: records of tasks, by name."""

    name: str
    records: Mapping[str, Mapping[str, Any]]
    samples: Sequence[Sample]


def model_of(name: str, folder: Path) -> Model:
    """Return the scores of an output folder. Raises UserError if it has none."""
    records = {path.parent.name: read_object(path) for path in sorted(folder.glob(f"*/{SCORE}"))}
    if not records:
        raise UserError(f"{folder} holds no scores; make them with jvlm evaluate --output {folder}")
    samples = [sample for task, record in records.items() for sample in _samples(name, folder / task, record)]
    return Model(name, records, samples)


def _samples(name: str, folder: Path, record: Mapping[str, Any]) -> list[Sample]:
    replies = AnswerStore(folder).read()
    lines = [line for line in read_lines(folder / SCORES) if (line["id"], line["run"]) in replies and line["run"] == 0]
    chosen: list[dict[str, Any]] = []
    by_reason: dict[str, list[dict[str, Any]]] = defaultdict(list)
    lines.sort(key=lambda line: not path_of(folder, line["id"]).exists())  # those with pictures first
    for line in lines:
        by_reason[line["reason"]].append(line)
    while len(chosen) < _SAMPLES and any(by_reason.values()):  # some of every reason
        chosen += [own.pop(0) for own in by_reason.values() if own]
    return [_sample(name, folder, record, replies[line["id"], 0], line) for line in chosen[:_SAMPLES]]


def _sample(name: str, folder: Path, record: Mapping[str, Any], stored: Stored, line: Mapping[str, Any]) -> Sample:
    value = line["value"]
    state = "unscored" if value is None else "right" if value >= 1 else "wrong" if value <= 0 else "partly"
    text = spoken(stored.text)
    answer = stored.error or (text if isinstance(text, str) else stored.text)
    picture = path_of(folder, stored.item.id)
    uri, size = "", (1, 1)
    if picture.exists():
        uri = f"data:image/jpeg;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    boxes: list[tuple[str, tuple[float, float, float, float]]] = []
    points: list[tuple[str, tuple[float, float]]] = []
    if stored.sizes and record["metric"] in ("box_iou50", "point_in_box"):
        size = stored.sizes[0].original
        for kind, values in (("gold", stored.item.gold), ("answer", line["parsed"])):
            values = [float(number) for number in values] if isinstance(values, list) else []
            if len(values) == 4:
                boxes.append((kind, (values[0], values[1], values[2] - values[0], values[3] - values[1])))
            elif len(values) == 2:
                points.append((kind, (values[0], values[1])))
    elif uri:
        size = stored.sizes[0].original if stored.sizes else (4, 3)
    return Sample(
        stored.item.id,
        record["task"],
        name,
        stored.question,
        answer[:_LONGEST] + ("…" if len(answer) > _LONGEST else ""),
        str(stored.item.answer or stored.item.gold)[:_LONGEST],
        value,
        line["reason"],
        state,
        uri,
        size,
        tuple(boxes),
        tuple(points),
    )


def suites(models: Sequence[Model]) -> dict[str, list[float | None]]:
    """Return the plain mean of each suite whose tasks some model has all of, and the means of several suites."""
    found: dict[str, list[float | None]] = {}
    for name, tasks in SUITES.items():
        means = []
        for model in models:
            own = [model.records[task] for task in tasks if task in model.records]
            whole = len(own) == len(tasks) and all(one["value"] is not None for one in own)
            means.append(sum(100 * one["value"] for one in own) / len(own) if whole else None)
        if any(mean is not None for mean in means):
            found[name] = means
    for name, members in MEANS_OF_SUITES.items():
        parts = [found[member] for member in members if member in found]
        if len(parts) == len(members):
            found[name] = [None if None in column else sum(column) / len(column) for column in zip(*parts, strict=True)]
    return found


@dataclasses.dataclass(frozen=True)
class Categories:
    """The scores of a task by one kind of category: (name, score of each model or None), in order of name."""

    task: str
    kind: str
    unit: float
    rows: Sequence[tuple[str, Sequence[Mapping[str, Any] | None]]]


def categories(models: Sequence[Model], tasks: Sequence[str]) -> list[Categories]:
    """Return the scores by category, those of all models side by side."""
    found = []
    for task in tasks:
        records = [model.records.get(task, {}) for model in models]
        unit = next(float(record["unit"]) for record in records if record)
        for kind in dict.fromkeys(kind for record in records for kind in record.get("categories", {})):
            parts = [record.get("categories", {}).get(kind, {}) for record in records]
            names = sorted({name for part in parts for name in part})
            found.append(Categories(task, kind, unit, [(name, [part.get(name) for part in parts]) for name in names]))
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
    page = environment.get_template("page.html.jinja").render(
        title=title,
        models=models,
        tasks=tasks,
        groups=list(dict.fromkeys(one["group"] for model in models for one in model.records.values())),
        suites=suites(models),
        categories=categories(models, tasks),
        reasons=reasons,
        about={name: metric.about for name, metric in METRICS.items()},
        samples=[sample for model in models for sample in model.samples],
        elo=elo,
        duels=duels[:_DUELS],
        duels_in_all=len(duels),
    )
    return page.encode("utf-8", "backslashreplace")


def write_page(target: Path, page: bytes) -> None:
    """Write the page. Raises UserError for a target that is something else than a page."""
    check_target(target)
    write(target, page)

"""Which questions the report shows, and each model's answer to them."""

from __future__ import annotations

import base64
import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jvlm.evaluation.store import SCORES, AnswerStore, Stored, read_lines
from jvlm.evaluation.thumbnails import path_of
from jvlm.scoring.answers import spoken

MOST = 12  # questions of each task
_LONGEST = 600  # characters of a shown answer
_REGIONS = ("box_iou50", "point_in_box")
Shape = tuple[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Sample:
    """An answer as the page shows it.

    Attributes:
      state: "right", "partly", "wrong", or "unscored".
      differ: whether the models of the page differ in their scores of this question.
      boxes: (whose, (x, y, width, height)), "gold" or "answer", in pixels of ``size``.
      points: (whose, (x, y)).
      polygons: (whose, (x1, y1, x2, y2, ...)).
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
    differ: bool = False
    picture: str = ""
    size: tuple[int, int] = (1, 1)
    boxes: tuple[Shape, ...] = ()
    points: tuple[Shape, ...] = ()
    polygons: tuple[Shape, ...] = ()


def samples(task: str, folders: Mapping[str, Path], metrics: Mapping[str, str]) -> list[Sample]:
    """Return answers to some questions of a task, those of all models to each: questions of every kind of outcome.

    Args:
      folders: of the task's answers, by the name of the model.
      metrics: of the task, by the name of the model.
    """
    replies = {name: AnswerStore(folder).read() for name, folder in folders.items()}
    lines = {
        name: {
            line["id"]: line
            for line in read_lines(folder / SCORES)
            if line["run"] == 0 and (line["id"], 0) in replies[name]
        }
        for name, folder in folders.items()
    }
    found = []
    for question in _chosen(folders, lines):
        values = {own[question]["value"] for own in lines.values() if question in own}
        for name, folder in folders.items():
            if question in lines[name]:
                stored, line = replies[name][question, 0], lines[name][question]
                shown = _sample(task, name, folder, metrics[name], stored, line)
                found.append(dataclasses.replace(shown, differ=len(values) > 1))
    return found


def _chosen(folders: Mapping[str, Path], lines: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Return the questions to show: in turns one of each outcome of all models, those with a picture first."""
    by_outcome: dict[tuple[str, ...], list[str]] = defaultdict(list)
    every = list(dict.fromkeys(question for own in lines.values() for question in own))
    every.sort(key=lambda question: not any(path_of(folder, question).exists() for folder in folders.values()))
    for question in every:
        outcome = tuple(str(own.get(question, {}).get("reason")) for own in lines.values())
        by_outcome[outcome].append(question)
    chosen: list[str] = []
    while len(chosen) < MOST and any(by_outcome.values()):
        chosen += [own.pop(0) for own in by_outcome.values() if own]
    return chosen[:MOST]


def _sample(task: str, name: str, folder: Path, metric: str, stored: Stored, line: Mapping[str, Any]) -> Sample:
    value = line["value"]
    state = "unscored" if value is None else "right" if value >= 1 else "wrong" if value <= 0 else "partly"
    text = spoken(stored.text)
    answer = stored.error or (text if isinstance(text, str) else stored.text)
    picture = path_of(folder, stored.item.id)
    uri, size = "", stored.sizes[0].original if stored.sizes else (4, 3)
    if picture.exists():
        uri = f"data:image/jpeg;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    regions = []
    if metric in _REGIONS and stored.sizes:
        regions = [*_regions("gold", stored.item.gold), *_regions("answer", line["parsed"])]
    return Sample(
        stored.item.id,
        task,
        name,
        stored.question.removeprefix("<image>") if uri and stored.question.count("<image>") == 1 else stored.question,
        _short(answer),
        _short(str(stored.item.answer or stored.item.gold)),
        value,
        line["reason"],
        state,
        picture=uri,
        size=size,
        boxes=tuple((kind, (v[0], v[1], v[2] - v[0], v[3] - v[1])) for kind, v in regions if len(v) == 4),
        points=tuple((kind, values) for kind, values in regions if len(values) == 2),
        polygons=tuple((kind, values) for kind, values in regions if len(values) > 4),
    )


def _short(text: str) -> str:
    return text[:_LONGEST] + ("…" if len(text) > _LONGEST else "")


def _regions(kind: str, values: Any) -> list[Shape]:
    """Return one region, or each of several, that a score or a reference holds."""
    if not isinstance(values, list) or not values:
        return []
    if isinstance(values[0], list):
        return [shape for one in values for shape in _regions(kind, one)]
    return [(kind, tuple(float(number) for number in values))]

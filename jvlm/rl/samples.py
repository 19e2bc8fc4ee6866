"""The groups of a step as one HTML page that needs nothing else: pictures with all boxes, answers and rewards."""

from __future__ import annotations

import base64
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jvlm.errors import UserError
from jvlm.rl.records import AnswerRecord
from jvlm.rl.rollout_files import StoredGroup, read_groups, read_image, read_summary

SAMPLES = "samples.html"  # in the folder of a run
LARGEST = 20_000_000  # bytes of the page
_SHOWN = 24  # groups
_LONGEST = 1500  # characters of a shown text
_END = "</think>"
_TYPES = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}

Corners = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class ShownAnswer:
    """An answer as the page shows it.

    Attributes:
      colour: from red to green, by its advantage where a step trained on it, else by its reward.
      boxes: (x, y, width, height) in the numbers that the model writes.
      points: (x, y) of them.
    """

    text: str
    thinking: str
    reward: float | None
    shaped: float | None
    reason: str
    advantage: float | None
    tokens: int
    colour: str
    boxes: tuple[Corners, ...]
    points: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class ShownGroup:
    """A group as the page shows it.

    Attributes:
      pictures: data URIs of its images; boxes are drawn on the first.
      size: width and height of that image, in the numbers of the boxes.
      gold_boxes, gold_points: what is right.
    """

    serial: int
    origin: str
    task: str
    question: str
    gold: str
    rate: float | None
    selected: bool
    from_pool: bool
    pictures: tuple[str, ...]
    size: tuple[float, float]
    gold_boxes: tuple[Corners, ...]
    gold_points: tuple[tuple[float, float], ...]
    answers: tuple[ShownAnswer, ...]


def chosen(groups: Sequence[StoredGroup], count: int = _SHOWN) -> list[StoredGroup]:
    """Return the groups to show: of each task in turn the one with the least mean reward, the one with the most, and
    so on. Groups that a step trained on come before others.
    """
    rows: list[list[StoredGroup]] = []
    for task in sorted({one.group.task for one in groups}):
        own = [one for one in groups if one.group.task == task and one.group.answers]
        ranked: list[StoredGroup] = []
        for selected in (True, False):
            part = sorted((one for one in own if one.group.selected == selected), key=_rate)
            while part:
                ranked.append(part.pop(0))
                if part:
                    ranked.append(part.pop())
        rows.append(ranked)
    longest = max(map(len, rows), default=0)
    return [row[place] for place in range(longest) for row in rows if place < len(row)][:count]


def _rate(one: StoredGroup) -> float:
    rewards = [reward for reward in one.group.rewards if reward is not None]
    return statistics.fmean(rewards) if rewards else -1.0


def shown(one: StoredGroup, pictures: Sequence[bytes]) -> ShownGroup:
    """Return a group with the contents of its image files."""
    item = one.prompt
    boxes, points = _regions(item.gold)
    size = item.columns.get("size")
    usable = isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int | float) for side in size)
    rewards = [reward for reward in one.group.rewards if reward is not None]
    return ShownGroup(
        one.group.serial,
        one.group.origin,
        one.group.task,
        _short(item.prompt),
        _short(str(item.gold)),
        statistics.fmean(rewards) if rewards else None,
        one.group.selected,
        one.group.from_pool,
        tuple(_uri(content) for content in pictures),
        (float(size[0]), float(size[1])) if usable else (1000.0, 1000.0),
        boxes,
        points,
        tuple(_answer(answer) for answer in one.group.answers),
    )


def _answer(answer: AnswerRecord) -> ShownAnswer:
    thinking, end, text = answer.text.rpartition(_END)
    boxes, points = _regions(answer.parsed)
    return ShownAnswer(
        _short(text.strip()),
        _short((thinking + end).strip()),
        answer.reward,
        answer.shaped,
        answer.reason,
        answer.advantage,
        len(answer.tokens),
        _colour(answer),
        boxes,
        points,
    )


def _colour(answer: AnswerRecord) -> str:
    """Return red for the least, green for the most, grey where there is nothing to show."""
    if answer.reward is None:
        return "hsl(0 0% 55%)"
    place = answer.reward if answer.advantage is None else (max(-2.0, min(2.0, answer.advantage)) + 2) / 4
    return f"hsl({120 * place:.0f} 75% 36%)"


def _regions(value: Any) -> tuple[tuple[Corners, ...], tuple[tuple[float, float], ...]]:
    """Return the boxes and points of a list of them."""
    rows = value if isinstance(value, list | tuple) else ()
    plain = [row for row in rows if isinstance(row, list | tuple) and all(isinstance(x, int | float) for x in row)]
    boxes = tuple((row[0], row[1], row[2] - row[0], row[3] - row[1]) for row in plain if len(row) == 4)
    points = tuple((row[0], row[1]) for row in plain if len(row) == 2)
    return tuple(box for box in boxes if box[2] >= 0 and box[3] >= 0), points


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _uri(content: bytes) -> str:
    kind = next((kind for start, kind in _TYPES.items() if content.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def render(
    step: int,
    groups: Sequence[StoredGroup],
    pictures_of: Callable[[StoredGroup], Sequence[bytes]],
    values: Mapping[str, Any],
    *,
    largest: int = LARGEST,
) -> bytes:
    """Return the page of a step, with fewer groups where it would be larger than ``largest`` bytes.

    Args:
      pictures_of: contents of the image files of a group.
      values: of the step, by their names in the log.

    Raises:
      UserError: it is larger without any group.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jvlm.rl", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("samples.html.jinja")
    cards = [shown(one, pictures_of(one)) for one in chosen(groups)]
    tasks = sorted({one.group.task for one in groups if one.group.answers})
    while True:
        page = template.render(
            step=step,
            tasks=tasks,
            cards=cards,
            count=len(groups),
            values={name: value for name, value in values.items() if isinstance(value, int | float)},
            histograms={task: _histogram(task, values) for task in tasks},
            reasons={task: _reasons(task, values) for task in tasks},
        )
        encoded = page.encode("utf-8", "backslashreplace")
        if len(encoded) <= largest:
            return encoded
        if not cards:
            raise UserError(f"the page of step {step} has {len(encoded):,} bytes without any group")
        cards = cards[: len(cards) // 2]


def _histogram(task: str, values: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(name.rpartition("/")[2], values[name]) for name in values if name.startswith(f"pass_rate/{task}/")]


def _reasons(task: str, values: Mapping[str, Any]) -> list[tuple[str, float]]:
    start = f"reward/{task}/reason/"
    return [(name.removeprefix(start), values[name]) for name in values if name.startswith(start)]


def page_of(folder: Path, step: int) -> bytes:
    """Return the page of a step that is stored.

    Args:
      folder: ``rollouts`` of the run.

    Raises:
      UserError: the step is not there; a file is damaged.
    """
    groups, values = list(read_groups(folder, [step])), read_summary(folder, step)
    return render(step, groups, lambda one: [read_image(folder, name) for name in one.images], values)

"""Elements of mobile screens: whether one can be tapped (Taperception), and Ferret-UI's elementary tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jvlm.data.boxes import Box
from jvlm.data.content import ObjectBox, Part, Text
from jvlm.data.errors import ExampleError
from jvlm.errors import file_errors
from jvlm.evaluation.files import Row, official
from jvlm.evaluation.items import key
from jvlm.evaluation.task import Item, Task
from jvlm.evaluation.tasks.kinds import BRIEF, located

_PLACE = re.compile(r"<bbox_location(\d+)>")
_REFERRING = ("ocr", "icon_recognition", "widget_classification")
_GROUNDING = ("find_text", "find_icon", "find_widget")


def _tappable(row: Row) -> Item | None:
    """Return an element of a screen of RICO, which more or fewer than half of the raters would tap."""
    if row.get("split") != "test":
        return None
    screen, element = row.text("img_id"), row.text("object_id")
    tappable = int(row.need("label")) == 0
    shown = (
        *Row({"image": f"{screen}.jpg"}, row.origin, row.form, row.media).images("image"),
        Text("Can the element "),
        ObjectBox(_place(row, screen, element)),
        Text(" of this screen of a mobile app be tapped?"),
    )
    answer = "yes" if tappable else "no"
    return Item(f"{screen}:{element}", shown, [answer], {"positive": tappable}, answer, group=screen)


def _place(row: Row, screen: str, element: str) -> Box:
    """Return where an element is, in shares of the screen, from the screen's view hierarchy."""
    path = Path(row.media or ".") / f"{screen}.json"
    fix = "Put RICO's folder of screenshots and view hierarchies, combined, beside the file"
    if not path.is_file():
        raise ExampleError(row.origin, "img_id", f"{path} is not there", fix)
    with file_errors(str(path), "read"), open(path, encoding="utf-8") as file:
        root = json.load(file)["activity"]["root"]
    _, _, width, height = (float(value) for value in root["bounds"])
    for node in _nodes(root):
        if node.get("pointer") == element:
            x1, y1, x2, y2 = (float(value) for value in node["bounds"])
            shares = (x1 / width, y1 / height, x2 / width, y2 / height)
            return Box(*(min(max(value, 0.0), 1.0) for value in shares), "norm1")
    raise ExampleError(row.origin, "object_id", f"{path} has no element {element}", fix)


def _nodes(node: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if node:
        yield node
        for child in node.get("children") or ():
            yield from _nodes(child)


def _kind(row: Row, kinds: tuple[str, ...]) -> str | None:
    """Return which kind of question a file holds, which its name says."""
    name = Path(row.origin.file).stem.lower()
    return next((kind for kind in kinds if kind in name), None)


def _turn(row: Row, number: int) -> tuple[str, list[list[float]]]:
    """Return the text of a turn, and its boxes in pixels."""
    turns, boxes = row.list("conversations"), row.list("box_x1y1x2y2")
    text = str(turns[number]["value"]) if number < len(turns) else ""
    found = boxes[number] if number < len(boxes) else []
    return text.replace("<image>", "").strip(), [[float(value) for value in box] for box in found or []]


def _shown(row: Row) -> tuple[Part, ...]:
    """Return a question, with its boxes as a model is told them."""
    text, boxes = _turn(row, 0)
    width, height = float(row.need("image_w")), float(row.need("image_h"))
    parts: list[Part] = []
    for at, piece in enumerate(_PLACE.split(text)):
        if at % 2 == 0:
            parts += [Text(piece)] if piece else []
            continue
        if int(piece) >= len(boxes):
            raise ExampleError(row.origin, "box_x1y1x2y2", f"no box for <bbox_location{piece}>", "Copy the file again")
        x1, y1, x2, y2 = boxes[int(piece)]
        parts.append(ObjectBox(Box(x1 / width, y1 / height, x2 / width, y2 / height, "norm1")))
    name = Path(row.text("image")).name
    return (*Row({"image": name}, row.origin, row.form, row.media).images("image"), *parts)


def _referred(row: Row) -> Item | None:
    """Return a question what an element is or says."""
    kind = _kind(row, _REFERRING)
    if kind is None:
        return None
    answer = str(row.get("label", default=_turn(row, 1)[0]))
    if not answer:
        raise ExampleError(row.origin, "label", "no answer, in no second turn either", "Give the file with its labels")
    return Item(f"{kind}:{key(row, 'id', '')}", _shown(row), [answer], answer=answer, categories={"category": kind})


def _found(row: Row) -> Item | None:
    """Return a question where an element is."""
    kind = _kind(row, _GROUNDING)
    if kind is None:
        return None
    _, boxes = _turn(row, 1)
    if len(boxes) != 1 or len(boxes[0]) != 4:
        problem = f"{len(boxes)} boxes of the answer, not one"
        raise ExampleError(row.origin, "box_x1y1x2y2", problem, "Give the file with the answers' boxes, in pixels")
    answer = str([round(value) for value in boxes[0]])
    name = f"{kind}:{key(row, 'id', '')}"
    return Item(name, _shown(row), boxes[0], answer=answer, categories={"category": kind})


_UI = "arXiv 2404.05719"
_FILES = "its authors publish the form of these files, and not the questions of their tests"
_LISTS = f"{_FILES}; widget listing, whose answers are lists, is left out"


def _referring(phone: str, published: dict[str, float]) -> Task:
    return Task(
        f"ferret_ui_ref_{phone}",
        "gui",
        (official(f"ferretui/{phone}/*.json", media="images"),),
        _referred,
        "exact",
        decoding=BRIEF,
        summary="macro_category",
        published=published,
        paper=_UI,
        note=_FILES,
    )


def _grounding(phone: str, published: dict[str, float]) -> Task:
    form = 'Output a JSON in the format [{"bbox_2d": [...], "label": "{the_element}"}, ...].'
    files = (official(f"ferretui/{phone}/*.json", media="images"),)
    return located(
        f"ferret_ui_grd_{phone}", "gui", files, _found, "box_iou50", form, _UI, published, _LISTS, "macro_category"
    )


TASKS = (
    Task(
        "taperception",
        "gui",
        (official("rico_tap_annotations_idsonly.csv", media="combined"),),
        _tappable,
        "yes_no",
        instruction="Answer yes or no.",
        boxed="Answer yes or no.",
        decoding=BRIEF,
        summary="f1",
        published={"MM1.5-UI-3B": 80.4, "MM1.5-UI-1B": 79.3, "Ferret-UI-13B": 78.4},
        paper="doi 10.1145/3491102.3502042",
        note="F1 of elements that can be tapped: published scores do not say of which class; an unread answer is wrong",
    ),
    _referring("iphone", {"MM1.5-UI-3B": 90.8, "MM1.5-UI-1B": 90.0, "Ferret-UI-13B": 80.5}),
    _referring("android", {"MM1.5-UI-3B": 89.2, "MM1.5-UI-1B": 88.6, "Ferret-UI-13B": 82.4}),
    _grounding("iphone", {"MM1.5-UI-3B": 87.3, "MM1.5-UI-1B": 86.5, "Ferret-UI-13B": 79.4}),
    _grounding("android", {"MM1.5-UI-3B": 88.8, "MM1.5-UI-1B": 88.2, "Ferret-UI-13B": 83.5}),
)

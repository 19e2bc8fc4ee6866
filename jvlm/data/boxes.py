"""Boxes: from a row's ``objects`` into text, and from generated text back to the original picture.

Qwen2.5-VL and MiMo-VL speak in absolute pixels of the *resized* picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Literal

BoxFormat = Literal["json", "qwen_tokens"]
Box = tuple[float, float, float, float]

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
# [x1, y1, x2, y2], (x1, y1, x2, y2), and Qwen's own (x1,y1),(x2,y2)
_BARE = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}(?:,|\)\s*,\s*\(){_NUMBER},{_NUMBER}[\])]")


def scale_box(box: Sequence[float], source: tuple[float, float], target: tuple[float, float]) -> list[float]:
    """Move points (x, y, x, y, ...) from a picture of size ``source`` (width, height) to one of size ``target``."""
    return [value / source[i % 2] * target[i % 2] for i, value in enumerate(box)]


def render_box(box: Sequence[float], form: BoxFormat) -> str:
    """Text of a box or point given in resized pixels, rounded to whole pixels."""
    values = [round(v) for v in box]
    if form == "json":
        return json.dumps(values)
    points = ",".join(f"({x},{y})" for x, y in zip(values[::2], values[1::2], strict=True))
    return f"<|box_start|>{points}<|box_end|>"


def parse_boxes(text: str) -> list[dict]:
    """Every box in a model's answer, as ``{"bbox_2d": [x1, y1, x2, y2], "label": str}``.

    Reads MiMo's fenced JSON list first (after any ``</think>``); if the text holds no valid JSON of that kind, bare
    ``[x1, y1, x2, y2]``, ``(x1, y1, x2, y2)`` or ``(x1,y1),(x2,y2)`` groups. An answer without boxes gives an empty
    list.
    """
    text = text.rpartition("</think>")[2]
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    try:
        found = json.loads(fenced.group(1) if fenced else text)
    except json.JSONDecodeError:
        found = None
    items = found if isinstance(found, list) else [found]
    boxes = [
        {"bbox_2d": [float(v) for v in item["bbox_2d"]], "label": str(item.get("label", ""))}
        for item in items
        if isinstance(item, dict) and _is_box(item.get("bbox_2d"))
    ]
    if boxes:
        return boxes
    return [{"bbox_2d": [float(v) for v in match.groups()], "label": ""} for match in _BARE.finditer(text)]


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(isinstance(v, int | float) for v in value)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two (x1, y1, x2, y2) boxes; 0 when both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    area = sum(max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (a, b))
    return both / (area - both) if area > both else 0.0

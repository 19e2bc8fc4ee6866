"""Points and boxes as text: written the way each family was trained, and read back from what models answer."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from jvlm.data.boxes import CoordinateSpace, Point, Region, Sizes, region
from jvlm.data.values import number

FormatName = Literal["json", "json_1000", "qwen_tokens", "qwen_tokens_1000", "ferret", "mm1_5"]


@dataclasses.dataclass(frozen=True)
class BoxFormat:
    """How regions are written.

    Attributes:
      space: that the numbers are in.
      floor: cut fractions off instead of rounding them to the nearest whole number.
      box, point: templates over x1, y1, x2, y2 and x, y.
      named: template of an object and its region, over label and region; JSON has none, it is a list of objects.
      largest: number of thousandths that is written, where these are the space.
    """

    space: CoordinateSpace
    floor: bool
    box: str
    point: str
    named: str | None
    largest: int = 999


_TOKENS = (
    "<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>",
    "<|box_start|>({x},{y})<|box_end|>",
    "<|object_ref_start|>{label}<|object_ref_end|>{region}",
)
# Literal forms: MiMo-VL and Qwen2.5-VL (absolute pixels of the resized image), Qwen3-VL (the same, but thousandths from
# 0 to 1000), Qwen-VL's own tokens (the same pixels for Qwen2.5-VL, thousandths below 1000 for Qwen2-VL), Ferret
# (vocabulary 1000, truncated, plain digits), and what readers of the MM1.5 paper report, which publishes no form.
FORMATS: dict[FormatName, BoxFormat] = {
    "json": BoxFormat("resized", False, "[{x1}, {y1}, {x2}, {y2}]", "[{x}, {y}]", None),
    "json_1000": BoxFormat("norm1000", False, "[{x1}, {y1}, {x2}, {y2}]", "[{x}, {y}]", None, largest=1000),
    "qwen_tokens": BoxFormat("resized", False, *_TOKENS),
    "qwen_tokens_1000": BoxFormat("norm1000", True, *_TOKENS),
    "ferret": BoxFormat("norm1000", True, "[{x1}, {y1}, {x2}, {y2}]", "[{x}, {y}]", "{label} {region}"),
    "mm1_5": BoxFormat("norm1000", True, "<{x1},{y1},{x2},{y2}>", "<{x},{y}>", "{label} {region}"),
}


@dataclasses.dataclass(frozen=True)
class Detection:
    """A region and what is there; the label is empty where a text gives none."""

    label: str
    region: Region


def render(
    region: Region, form: FormatName, sizes: Sizes | None = None, *, space: CoordinateSpace | None = None
) -> str:
    """Return the text of a region.

    Args:
      sizes: of its image; needed unless the region is in the space of the text already.
      space: replaces the format's own.
    """
    style = FORMATS[form]
    space = space or style.space
    values = [_number(v, space, style) for v in region.to(space, sizes).values]
    names = ("x", "y") if isinstance(region, Point) else ("x1", "y1", "x2", "y2")
    template = style.point if isinstance(region, Point) else style.box
    return template.format(**dict(zip(names, values, strict=True)))


def _number(value: float, space: CoordinateSpace, style: BoxFormat) -> str:
    if space == "norm1":
        return f"{value:.3f}"
    # a whole number that arithmetic has brought a hair below itself must not fall into the bin before
    whole = math.floor(value + 1e-6) if style.floor else round(value)
    return str(min(max(whole, 0), style.largest) if space == "norm1000" else whole)


def render_named(
    detections: Sequence[Detection],
    form: FormatName,
    sizes: Sizes | None = None,
    *,
    space: CoordinateSpace | None = None,
) -> str:
    """Return a whole answer: MiMo's fenced JSON list, or labels with their regions, one a line."""
    texts = [render(item.region, form, sizes, space=space) for item in detections]
    named = FORMATS[form].named
    if named is not None:
        return "\n".join(
            named.format(label=item.label, region=text) if item.label else text
            for item, text in zip(detections, texts, strict=True)
        )
    keys = ["point_2d" if isinstance(item.region, Point) else "bbox_2d" for item in detections]
    items = [
        f'{{"{key}": {text}, "label": {json.dumps(item.label, ensure_ascii=False)}}}'
        for key, item, text in zip(keys, detections, texts, strict=True)
    ]
    return "```json\n[" + ", ".join(items) + "]\n```"


_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_TWO, _FOUR = ",".join([_NUMBER] * 2), ",".join([_NUMBER] * 4)
# [x1, y1, x2, y2], (x1, y1, x2, y2), <x1,y1,x2,y2>, Qwen's own (x1,y1),(x2,y2), and the same for points
_GROUP = re.compile(rf"\[{_FOUR}\]|\({_FOUR}\)|<{_FOUR}>|\({_TWO}\)\s*,\s*\({_TWO}\)|\[{_TWO}\]|\({_TWO}\)|<{_TWO}>")
_AROUND = re.compile(r"<\|(?:object_ref|box)_(?:start|end)\|>")


def parse(text: str, form: FormatName, *, space: CoordinateSpace | None = None) -> list[Detection]:
    """Every box and point of a model's answer, in order; none gives an empty list.

    What stands before the last ``</think>`` does not count. A JSON list of objects (fenced or not) is read first;
    a text without one is searched for ``[...]``, ``(...)`` and ``<...>`` of two or four numbers and Qwen's pairs of
    points, whatever the format, since models mix them up. Boxes with swapped corners are no boxes.

    Args:
      form: tells the space of the numbers, and whether labels are the words before a region.
      space: replaces the format's own.
    """
    space = space or FORMATS[form].space
    found = ((one.label, _region(one.values, space)) for one in parse_numbers(text.rpartition("</think>")[2], form))
    return [Detection(label, region) for label, region in found if region is not None]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The two or four numbers of a point or box as they were written, right or not, and its label."""

    label: str
    values: tuple[float, ...]


def parse_numbers(text: str, form: FormatName) -> list[Numbers]:
    """Return what a text holds in the form of points and boxes, as `parse` reads it; swapped corners are there too."""
    return list(_from_json(text)) or list(_from_groups(text, labelled=FORMATS[form].named is not None))


def _from_json(text: str) -> Iterator[Numbers]:
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    try:
        value = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):  # not JSON; or numbers too long, or lists too deep, to be meant
        return
    for item in value if isinstance(value, list) else [value]:
        for key, count in (("bbox_2d", 4), ("point_2d", 2)):
            values = item.get(key) if isinstance(item, dict) else None
            if isinstance(values, list) and len(values) == count and all(number(v) is not None for v in values):
                label = item.get("label")
                yield Numbers("" if label is None else str(label), tuple(float(v) for v in values))


def _from_groups(text: str, *, labelled: bool) -> Iterator[Numbers]:
    end = 0
    for match in _GROUP.finditer(text):
        values = tuple(float(v) for v in match.groups() if v is not None)
        yield Numbers(_label(text[end : match.start()]) if labelled else "", values)
        end = match.end()


def _label(before: str) -> str:
    """Return the words before a region, on its own line and without what separates it from the region before."""
    return _AROUND.sub("", before.rpartition("\n")[2]).strip().lstrip(",;.: ").strip()


def _region(values: Sequence[float], space: CoordinateSpace) -> Region | None:
    try:
        return region(values, space)
    except ValueError:
        return None

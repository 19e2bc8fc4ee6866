"""Where: boxes and points, by the best one-to-one assignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from jvlm.data.box_formats import FormatName, Numbers, parse_numbers
from jvlm.data.boxes import giou_of
from jvlm.scoring.answers import answer, normalise
from jvlm.scoring.score import Score

Overlap = Literal["giou01", "giou", "iou"]
_OUTSIDE = 0.05  # share of the image's side that a box may lie outside of it
_NOTHING = ("[]", "none", "nothing", "no")


def boxes(
    text: str,
    golds: Sequence[tuple[str, Sequence[float]]],
    size: tuple[float, float],
    *,
    overlap: Overlap = "giou01",
    labels: bool = False,
    form: FormatName = "json",
    thinking_opened: bool = False,
) -> Score:
    """Return the sum of overlaps of the best one-to-one assignment over max(expected, answered).

    So several guesses never earn more than the mean of each alone. Boxes with swapped corners, without area, or more
    than 5 % outside the image overlap nothing, but count as answered.

    Args:
      golds: (label, (x1, y1, x2, y2)) of each expected box, in the space of the answer's numbers.
      size: (width, height) of the image in that space.
      overlap: "giou01" is (GIoU + 1) / 2, "giou" is max(GIoU, 0).
      labels: whether a box answers only one of the same label.
      form: how the answer writes boxes; "json" also reads brackets in prose.
    """
    content = answer(text, thinking_opened=thinking_opened)
    if isinstance(content, Score):
        return content
    found = parse_numbers(content, form)
    if not golds:
        nothing = not found and (content.replace(" ", "") == "[]" or normalise(content) in _NOTHING)
        return Score.of(nothing, _values(found))
    if not found:
        return Score(0.0, "unparsed")

    def similarity(gold: tuple[str, Sequence[float]], answered: Numbers) -> float:
        if len(answered.values) != 4 or not _plausible(answered.values, size):
            return 0.0
        if labels and normalise(gold[0]) != normalise(answered.label):
            return 0.0
        iou, giou = giou_of(gold[1], answered.values)
        return {"giou01": (giou + 1) / 2, "giou": max(giou, 0.0), "iou": iou}[overlap]

    return Score(assignment(golds, found, similarity), "ok", _values(found))


def points(
    text: str,
    golds: Sequence[Sequence[float]],
    *,
    box_centre: bool = False,
    form: FormatName = "json",
    thinking_opened: bool = False,
) -> Score:
    """Return how many expected boxes hold a point of their own, edges included, over max(expected, answered).

    Args:
      golds: (x1, y1, x2, y2) of each, in the space of the answer's numbers.
      box_centre: whether a box in the answer counts as its centre; else it is a point in no box.
    """
    content = answer(text, thinking_opened=thinking_opened)
    if isinstance(content, Score):
        return content
    found = parse_numbers(content, form)
    if not found:
        return Score(0.0, "unparsed")

    def inside(gold: Sequence[float], answered: Numbers) -> float:
        values = answered.values
        if len(values) == 4:
            if not box_centre:
                return 0.0
            values = ((values[0] + values[2]) / 2, (values[1] + values[3]) / 2)
        return float(holds(gold, values))

    return Score(assignment(golds, found, inside), "ok", _values(found))


def holds(box: Sequence[float], point: Sequence[float]) -> bool:
    """Return whether (x, y) lies in (x1, y1, x2, y2), edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def assignment(golds: Sequence, found: Sequence, similarity: Callable[..., float]) -> float:
    """Return the sum of similarities of the best one-to-one assignment over the larger number of both."""
    table: Float[np.ndarray, "G F"] = np.array([[similarity(gold, one) for one in found] for gold in golds])
    pairs = linear_sum_assignment(-table)
    return float(np.clip(table[pairs].sum() / max(table.shape), 0, 1))


def _plausible(box: Sequence[float], size: tuple[float, float]) -> bool:
    x1, y1, x2, y2 = box
    x, y = size[0] * _OUTSIDE, size[1] * _OUTSIDE
    return x1 < x2 and y1 < y2 and x1 >= -x and y1 >= -y and x2 <= size[0] + x and y2 <= size[1] + y


def _values(found: Sequence[Numbers]) -> list[list[float]]:
    return [list(one.values) for one in found]

"""Points and boxes, always in a declared space; how they are written is in `jvlm.data.box_formats`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jvlm.data.values import number, shown

CoordinateSpace = Literal["original", "resized", "norm1", "norm1000"]


class Sizes(NamedTuple):
    """(width, height) in pixels of an image as it was given, and as the encoder sees it."""

    original: tuple[int, int]
    resized: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Point:
    """x to the right and y down, from the top left corner.

    Attributes:
      space: "original" or "resized" pixels, shares 0..1 of the image ("norm1"), or thousandths, 0..999 once
        written ("norm1000"). Values are kept as they are; rounding is a matter of the text.

    Raises:
      ValueError: what is no finite number.
    """

    x: float
    y: float
    space: CoordinateSpace

    def __post_init__(self):
        _check_finite(self)

    @property
    def values(self) -> tuple[float, ...]:
        return (self.x, self.y)

    def to(self, space: CoordinateSpace, sizes: Sizes | None = None) -> Point:
        """Return the same point in another space; ``sizes`` of its image are needed wherever pixels are involved."""
        if self.space == space:
            return self
        return Point(*_move(self, space, sizes), space)


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle from its top left corner (x1, y1) to its bottom right corner (x2, y2); ``space`` as in `Point`.

    Raises:
      ValueError: what is no finite number, or corners in the wrong order.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    space: CoordinateSpace

    def __post_init__(self):
        _check_finite(self)
        if self.x1 > self.x2 or self.y1 > self.y2:
            raise ValueError(f"{list(self.values)} has its corners swapped; order them x1, y1, x2, y2")

    @property
    def values(self) -> tuple[float, ...]:
        return (self.x1, self.y1, self.x2, self.y2)

    @property
    def area(self) -> float:
        return (self.x2 - self.x1) * (self.y2 - self.y1)

    def to(self, space: CoordinateSpace, sizes: Sizes | None = None) -> Box:
        """Return the same box in another space; ``sizes`` of its image are needed wherever pixels are involved."""
        if self.space == space:
            return self
        return Box(*_move(self, space, sizes), space)

    def holds(self, point: Point) -> bool:
        """Whether a point of the same space lies in the box, edges included."""
        _check_same_space(self, point)
        return self.x1 <= point.x <= self.x2 and self.y1 <= point.y <= self.y2


Region = Point | Box


def region(values: Sequence[float], space: CoordinateSpace) -> Region:
    """Return a `Point` of two numbers or a `Box` of four."""
    if len(values) not in (2, 4):
        raise ValueError(f"{list(values)} is not a point or box: give 2 or 4 numbers")
    return Point(*values, space) if len(values) == 2 else Box(*values, space)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes of the same space; 0 when both are empty."""
    _check_same_space(a, b)
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    both = max(width, 0) * max(height, 0)
    union = a.area + b.area - both
    return both / union if union > 0 else 0.0


def giou_of(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return (IoU, generalised IoU; arXiv 1902.09630) of two boxes (x1, y1, x2, y2) that are not empty."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union, both / union - (hull - union) / hull


# Two points agree when they are no farther apart than this share of the image on either axis.
POINT_REACH = 0.05


def match_score(expected: Region, predicted: Region, sizes: Sizes) -> float:
    """Return how well two regions agree, 0..1: IoU of two boxes; 1 or 0 where a point is involved.

    A point agrees with a box that holds it, and with a point within `POINT_REACH` of the image's sides.
    """
    expected, predicted = expected.to("norm1", sizes), predicted.to("norm1", sizes)
    if isinstance(expected, Box) and isinstance(predicted, Box):
        return iou(expected, predicted)
    if isinstance(expected, Box):
        return float(expected.holds(predicted))
    if isinstance(predicted, Box):
        return float(predicted.holds(expected))
    return float(max(abs(expected.x - predicted.x), abs(expected.y - predicted.y)) <= POINT_REACH)


def _check_finite(region: Region) -> None:
    if any(number(value) is None for value in region.values):
        raise ValueError(f"{shown(list(region.values))} holds a number that is not finite, or no number")


def _check_same_space(a: Region, b: Region) -> None:
    if a.space != b.space:
        raise ValueError(f"a region in {a.space} cannot be compared with one in {b.space}; convert one with .to()")


def _extent(space: CoordinateSpace, sizes: Sizes | None) -> tuple[float, float]:
    """Width and height of an image in a space."""
    if space in ("norm1", "norm1000"):
        return (1.0, 1.0) if space == "norm1" else (1000.0, 1000.0)
    if sizes is None:
        raise ValueError(f"the size of the image is needed to convert from or to {space} pixels")
    return sizes.original if space == "original" else sizes.resized


def _move(region: Region, space: CoordinateSpace, sizes: Sizes | None) -> tuple[float, ...]:
    source, target = _extent(region.space, sizes), _extent(space, sizes)
    return tuple(value / source[i % 2] * target[i % 2] for i, value in enumerate(region.values))

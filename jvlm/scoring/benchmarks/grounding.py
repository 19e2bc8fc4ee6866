"""Grounding: RefCOCO's accuracy at an IoU, and ScreenSpot's point in the box."""

from __future__ import annotations

from collections.abc import Sequence

from jvlm.data.box_formats import FormatName, parse
from jvlm.data.boxes import Box, CoordinateSpace, Point, Region, Sizes, iou
from jvlm.scoring.answers import spoken
from jvlm.scoring.score import Score


def box_at_iou(
    text: str,
    gold: Box,
    sizes: Sizes,
    *,
    threshold: float = 0.5,
    form: FormatName = "json",
    space: CoordinateSpace | None = None,
    union: bool = False,
) -> Score:
    """Return 1 if the only box of the answer and ``gold`` have at least this IoU.

    The answer's numbers are in the one space that the model is declared to use; no other is tried, and no box is chosen
    for its agreement with the reference. An answer of several boxes is "several_answers", and 0.

    Args:
      sizes: of the image.
      space: of the numbers; None is that of ``form``.
      union: of several boxes take the one around all, as Flickr30k Entities' merged boxes are; many that are spread
        over the image are none but the whole of it.
    """
    content = spoken(text)
    if isinstance(content, Score):
        return content
    found = [one.region for one in parse(content, form, space=space) if isinstance(one.region, Box)]
    moved = [one.to(gold.space, sizes) for one in found]
    if not moved or (len(moved) > 1 and not union):
        return _none(moved)
    given = Box(
        min(one.x1 for one in moved),
        min(one.y1 for one in moved),
        max(one.x2 for one in moved),
        max(one.y2 for one in moved),
        gold.space,
    )
    return Score.of(iou(given, gold) >= threshold, list(given.values))


def _none(found: Sequence[Region]) -> Score:
    """Return the score of no region, or of several: 0, with what was read."""
    if not found:
        return Score(0.0, "unparsed")
    return Score(0.0, "several_answers", [list(one.values) for one in found])


def point_in_box(
    text: str, gold: Box, sizes: Sizes, *, form: FormatName = "json", space: CoordinateSpace | None = None
) -> Score:
    """Return 1 if the only point of the answer, or the centre of its only box, lies in ``gold``, edges included.

    As `box_at_iou` otherwise.
    """
    content = spoken(text)
    if isinstance(content, Score):
        return content
    found = [one.region.to(gold.space, sizes) for one in parse(content, form, space=space)]
    if len(found) != 1:
        return _none(found)
    given = found[0]
    point = (
        given if isinstance(given, Point) else Point((given.x1 + given.x2) / 2, (given.y1 + given.y2) / 2, given.space)
    )
    return Score.of(gold.holds(point), list(given.values))


def point_in_polygon(
    text: str,
    gold: Sequence[tuple[float, float]],
    sizes: Sizes,
    *,
    form: FormatName = "json",
    space: CoordinateSpace | None = None,
) -> Score:
    """Return 1 if the only point of the answer, or the centre of its only box, lies in a polygon (OSWorld-G).

    Args:
      gold: its corners, in pixels of the original image.
    """
    content = spoken(text)
    if isinstance(content, Score):
        return content
    found = [one.region.to("original", sizes) for one in parse(content, form, space=space)]
    if len(found) != 1:
        return _none(found)
    values = found[0].values
    point = values if len(values) == 2 else ((values[0] + values[2]) / 2, (values[1] + values[3]) / 2)
    return Score.of(polygon_holds(gold, (point[0], point[1])), list(values))


def polygon_holds(polygon: Sequence[tuple[float, float]], point: tuple[float, float]) -> bool:
    """Return whether a point lies in a polygon (OSWorld-G), by the number of edges to its right."""
    x, y = point
    inside = False
    for (x1, y1), (x2, y2) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            inside = not inside
    return inside

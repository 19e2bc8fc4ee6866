"""A run as one HTML page that needs nothing else: numbers, curves, images with answers and boxes."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jvlm.data.boxes import Box
from jvlm.data.images import open_image
from jvlm.evaluation.score import Answer

WIDTH, HEIGHT = 560, 220  # of a plot


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a plot: the SVG points, the last value, and the labels of the axes' ends."""

    title: str
    points: str
    first: str
    last: str
    top: str
    bottom: str
    steps: int


def curve(title: str, lines: Sequence[Mapping[str, Any]], key: str, *, skip_first: bool = False) -> Curve:
    """Return the curve of one logged number over the steps.

    Args:
      skip_first: leave out the first of more than five values.
    """
    values = [(line["step_number"], line[key]) for line in lines if line.get(key) is not None]
    if skip_first and len(values) > 5:
        values = values[1:]
    lowest, highest = min(v for _, v in values), max(v for _, v in values)
    span, last = (highest - lowest) or 1.0, values[-1][0]
    points = " ".join(f"{WIDTH * s / last:.1f},{HEIGHT - HEIGHT * (v - lowest) / span:.1f}" for s, v in values)
    return Curve(title, points, f"{values[0][1]:.3g}", f"{values[-1][1]:.3g}", f"{highest:.3g}", f"{lowest:.3g}", last)


@dataclasses.dataclass(frozen=True)
class ShownImage:
    """An image of the test set with every question asked about it.

    Attributes:
      before: the answers of the model before training to the same questions; empty where it was not asked.
    """

    name: str
    source: str
    width: int
    height: int
    answers: tuple[Answer, ...]
    before: tuple[Answer, ...] = ()

    @property
    def expected(self) -> list[Box]:
        return [region for a in self.answers for region in a.reference if isinstance(region, Box)]

    @property
    def pairs(self) -> list[tuple[Answer, Answer | None]]:
        """Each answer beside that of the model before training."""
        return list(zip(self.answers, self.before or [None] * len(self.answers), strict=True))

    @property
    def predicted_before(self) -> list[Box]:
        return [region for a in self.before for region in a.predicted if isinstance(region, Box)]

    @property
    def predicted(self) -> list[Box]:
        return [region for a in self.answers for region in a.predicted if isinstance(region, Box)]


def shown_images(
    answers: Sequence[Answer], roots: tuple[str, ...], count: int = 18, *, before: Sequence[Answer] = ()
) -> list[ShownImage]:
    """Return the first images, each with all its answers; of examples with all questions on one image only.

    Args:
      roots: folders that media may lie in.
      before: answers of the model before training to the same questions, or none.
    """
    earlier = _by_example(before)
    chosen: list[ShownImage] = []
    for origin, group in _by_example(answers).items():
        shown = [[i.source for i in answer.question.conversation.images] for answer in group]
        images = shown[0]
        if len(chosen) == count or any(len(own) != 1 or own[0] is not images[0] for own in shown):
            continue
        image = open_image(images[0], origin=origin, roots=(str(Path(origin.file).parent), *roots))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        name = f"{Path(origin.file).name} #{origin.number}"
        chosen.append(ShownImage(name, source, *image.size, tuple(group), tuple(earlier.get(origin, ()))))
    return chosen


def _by_example(answers: Sequence[Answer]) -> dict[Any, list[Answer]]:
    groups: dict[Any, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.question.origin, []).append(answer)
    return groups


def write(path: Path, *, title: str, headline: Sequence[tuple[str, str, str]], **content: Any) -> None:
    """Write the page.

    Args:
      headline: (number, label, note) of the large figures on top.
      content: "curves", "images", "facts" (label -> text), "bars" ((label, share, baseline or None) each), "changes"
        (of `jvlm.evaluation.gains`).
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jvlm.evaluation", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(
        title=title, headline=headline, width=WIDTH, height=HEIGHT, **content
    )
    path.write_text(page)

"""Small pictures drawn with Pillow, with what is on them: scenes of shapes, words, sums, films of a moving shape."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.make_easy_vqa import COLOURS

SHAPES = ("circle", "rectangle", "triangle")
SIDE = 64  # pixels
_FINE = 4  # shapes are drawn so many times larger and made smaller, for soft edges
WORDS = (
    "ant bee cat cow dog eel elk fox hen owl pig rat cup hat key map net pen bag bed box bus car jar lamp tree moon "
    "star door fish ship wolf"
).split()
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape of one colour and its box in pixels."""

    colour: str
    kind: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


def paper(rng: np.random.Generator) -> tuple[int, int, int]:
    """Return a light colour for the ground."""
    return tuple(int(value) for value in rng.integers(205, 256, 3))


def shapes(
    rng: np.random.Generator, count: int, *, side: int = SIDE, sizes: tuple[int, int] = (14, 30), unique: bool = True
) -> list[Shape]:
    """Return shapes that do not touch; fewer than ``count`` only where no place was found for another.

    Args:
      sizes: least and most pixels of a side.
      unique: no two have the same colour and kind.
    """
    found: list[Shape] = []
    names = [(colour, kind) for colour in COLOURS for kind in SHAPES]
    for _ in range(40 * count):
        if len(found) == count:
            break
        colour, kind = names[int(rng.integers(len(names)))]
        if unique and any((one.colour, one.kind) == (colour, kind) for one in found):
            continue
        width, height = (int(value) for value in rng.integers(sizes[0], sizes[1] + 1, 2))
        if kind == "circle":
            height = width
        x, y = int(rng.integers(1, side - width)), int(rng.integers(1, side - height))
        box = (x, y, x + width, y + height)
        if all(_apart(box, one.box) for one in found):
            found.append(Shape(colour, kind, box))
    return found


def _apart(a: Box, b: Box) -> bool:
    return a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def scene(drawn: list[Shape], ground: tuple[int, int, int], side: int = SIDE) -> Image.Image:
    """Return a picture of shapes."""
    image = Image.new("RGB", (side * _FINE, side * _FINE), ground)
    draw = ImageDraw.Draw(image)
    for shape in drawn:
        x1, y1, x2, y2 = (value * _FINE for value in shape.box)
        colour = COLOURS[shape.colour]
        if shape.kind == "circle":
            draw.ellipse((x1, y1, x2 - 1, y2 - 1), fill=colour)
        elif shape.kind == "rectangle":
            draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colour)
        else:
            draw.polygon(((x1, y2 - 1), (x2 - 1, y2 - 1), ((x1 + x2) / 2, y1)), fill=colour)
    return image.resize((side, side), Image.Resampling.BOX)


def text(words: str, rng: np.random.Generator, size: tuple[int, int] = (SIDE, SIDE), height: int = 26) -> Image.Image:
    """Return words, a line each, in the middle of a picture but for a few pixels, as large as fits up to ``height``."""
    lines = words.split("\n")
    image = Image.new("RGB", size, paper(rng))
    draw = ImageDraw.Draw(image)
    face = ImageFont.load_default(height)
    while height > 6 and (
        max(draw.textlength(line, font=face) for line in lines) > size[0] - 6
        or len(lines) * height * 1.15 > size[1] - 4
    ):
        height -= 1
        face = ImageFont.load_default(height)
    ink = tuple(int(value) for value in rng.integers(0, 90, 3))
    step = 1.15 * height
    top = (size[1] - step * len(lines)) / 2 + int(rng.integers(-3, 4))
    for number, line in enumerate(lines):
        left = (size[0] - draw.textlength(line, font=face)) / 2 + int(rng.integers(-3, 4))
        draw.text((left, top + number * step), line, fill=ink, font=face)
    return image


def diagram(rng: np.random.Generator) -> tuple[Image.Image, tuple[str, str]]:
    """Return two shapes, one left and one right, with an arrow between them, and the names of its start and its end."""
    pair = [list(COLOURS)[int(rng.integers(len(COLOURS)))] for _ in range(2)]
    kinds = [SHAPES[i] for i in rng.permutation(3)[:2]]
    tops = [int(value) for value in rng.integers(4, SIDE - 24, 2)]
    drawn = [
        Shape(pair[i], kinds[i], (left, tops[i], left + 18, tops[i] + 18)) for i, left in enumerate((2, SIDE - 20))
    ]
    image = scene(drawn, paper(rng))
    draw = ImageDraw.Draw(image)
    ends = [(22, tops[0] + 9), (SIDE - 22, tops[1] + 9)]
    start, end = (0, 1) if rng.random() < 0.5 else (1, 0)
    (x1, y1), (x2, y2) = ends[start], ends[end]
    draw.line((x1, y1, x2, y2), fill=(40, 40, 40), width=1)
    step = 5 if x2 > x1 else -5
    draw.polygon(((x2, y2), (x2 - step, y2 - 4), (x2 - step, y2 + 4)), fill=(40, 40, 40))
    return image, (drawn[start].name, drawn[end].name)


def film(rng: np.random.Generator, moves: list[str], frames: int, side: int = 32) -> list[Image.Image]:
    """Return frames of a shape that goes one way after the other, from side to side of the picture."""
    colour, kind = list(COLOURS)[int(rng.integers(len(COLOURS)))], SHAPES[int(rng.integers(3))]
    size, ground = int(rng.integers(9, 13)), paper(rng)
    reach, drawn = side - size - 2, []
    across = int(rng.integers(1, reach))
    for direction in moves:
        dx, dy = DIRECTIONS[direction]
        for share in np.linspace(0, 1, frames // len(moves)):
            along = 1 + round(reach * (share if dx + dy > 0 else 1 - share))
            x, y = (along, across) if dx else (across, along)
            drawn.append(scene([Shape(colour, kind, (x, y, x + size, y + size))], ground, side))
    return drawn


def as_bytes(image: Image.Image) -> bytes:
    """Return an image as a file, without loss."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, quality=50, method=2)
    return file.getvalue()

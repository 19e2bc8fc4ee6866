"""A bar for each topology: what fills a chip's memory, and where the chip ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from jvlm.units import GIB

from .measure import Compiled

COLOURS = {
    "parameters": "#3b6ea8",
    "adapters": "#8a6bbf",
    "optimizer": "#6fa3d8",
    "cache": "#7fb069",
    "batch": "#8f8f8f",
    "activations": "#b3541e",
    "temporary": "#e0a458",
    "code": "#444444",
}
WIDTH, BAR, GAP, LEFT, RIGHT, TOP = 1100, 34, 26, 250, 150, 90


def draw(path: Path, title: str, bars: Sequence[tuple[str, Compiled]]) -> None:
    """Write a PNG: one stacked bar a topology, all in parts of their chip's memory, a line at its end."""
    height = TOP + len(bars) * (BAR + GAP) + 20
    image = Image.new("RGB", (WIDTH, height), "white")
    canvas = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    canvas.text((20, 14), title, "black", font)
    x = LEFT
    for name, colour in COLOURS.items():
        if not any(getattr(compiled.memory, name) for _, compiled in bars):
            continue
        canvas.rectangle((x, 50, x + 14, 64), colour)
        canvas.text((x + 20, 48), name, "black", small)
        x += 120
    most = max(1.0, *(c.memory.peak / c.limit for _, c in bars))
    scale = (WIDTH - LEFT - RIGHT) / most
    for index, (label, compiled) in enumerate(bars):
        y = TOP + index * (BAR + GAP)
        canvas.text((20, y + 8), label, "black", small)
        x = float(LEFT)
        for name, size in dataclasses.asdict(compiled.memory).items():
            wide = size / compiled.limit * scale
            canvas.rectangle((x, y, x + wide, y + BAR), COLOURS[name])
            x += wide
        end = LEFT + scale
        canvas.line((end, y - 8, end, y + BAR + 8), "#b03030", 3)
        colour = "black" if compiled.fits else "#b03030"
        text = f"{compiled.memory.peak / GIB:.1f} of {compiled.limit / GIB:.1f} GiB"
        canvas.text((max(x, end) + 8, y + 8), text, colour, small)
    image.save(path)

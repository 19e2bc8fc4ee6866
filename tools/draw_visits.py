"""Draw the blocks of scores that segment attention visits on one packed causal row: kernels/visits.png.

    python tools/draw_visits.py

Block sizes are those of the TPU kernel for a decoder of 32 query and 8 key heads of 128. Pixels are counted at the
width that the picture is shown in; it is drawn finer and scaled down.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jvlm_kernels.attention import blocks, tuning
from jvlm_kernels.attention.api import AttentionSpec
from PIL import Image, ImageDraw, ImageFont

TARGET = Path(__file__).parents[1] / "kernels/visits.png"
LENGTHS = (620, 1480, 300, 2730, 390, 880, 420, 560)
PLACES = 8192
HEADS, KEY_HEADS, HEAD_SIZE = 32, 8, 128

WIDTH, HEIGHT, SAVED, DRAWN = 900, 640, 2, 4  # and pixels saved and drawn for each of them
LEFT, TOP, SIDE = 56, 52, 560  # of the matrix
BAR = 16  # of the segments along its edges
INK, QUIET, PAPER = (38, 46, 60), (112, 121, 136), (255, 255, 255)
NOT_VISITED, MASKED, FULL, BORDER = (238, 240, 244), (158, 197, 240), (43, 108, 184), (217, 92, 24)
BARS, UNUSED = ((202, 208, 218), (226, 230, 237)), (246, 247, 249)


class Canvas:
    """Rectangles, lines and words in pixels of the picture as it is shown."""

    def __init__(self):
        self.image = Image.new("RGB", (WIDTH * DRAWN, HEIGHT * DRAWN), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, colour) -> None:
        """A filled rectangle with a white hairline around it."""
        corners = [round(x * DRAWN) for x in (left, top, right, bottom)]
        self._draw.rectangle(corners, fill=colour, outline=PAPER, width=DRAWN // 2)

    def line(self, points: list[tuple[float, float]], colour, width: float) -> None:
        """A closed line."""
        scaled = [(x * DRAWN, y * DRAWN) for x, y in [*points, *points[:2]]]
        self._draw.line(scaled, fill=colour, width=round(width * DRAWN), joint="curve")

    def words(self, x: float, y: float, text: str, *, size: int = 15, colour=INK, anchor: str = "lm") -> None:
        """Text; ``anchor`` as in Pillow."""
        font = ImageFont.load_default(size * DRAWN)
        self._draw.text((x * DRAWN, y * DRAWN), text, fill=colour, font=font, anchor=anchor)

    def upward(self, x: float, y: float, text: str, *, size: int = 15, colour=INK) -> None:
        """Text that reads from below, around its middle."""
        font = ImageFont.load_default(size * DRAWN)
        long, high = round(font.getlength(text)), 2 * size * DRAWN
        mask = Image.new("L", (long, high))
        ImageDraw.Draw(mask).text((long / 2, high / 2), text, fill=255, font=font, anchor="mm")
        place = round(x * DRAWN - high / 2), round(y * DRAWN - long / 2)
        self.image.paste(colour, place, mask.rotate(90, expand=True))

    def saved(self, path: Path) -> None:
        """Write the picture as a PNG of few colours."""
        scaled = self.image.resize((WIDTH * SAVED, HEIGHT * SAVED), Image.Resampling.LANCZOS)
        scaled.quantize(48, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)


def draw() -> Canvas:
    """The matrix of blocks, queries down and keys across, and its legend."""
    spec = AttentionSpec(True, None, HEAD_SIZE**-0.5, None)
    q, k = (jax.ShapeDtypeStruct((1, PLACES, heads, HEAD_SIZE), jnp.bfloat16) for heads in (HEADS, KEY_HEADS))
    sizes = tuning.tpu_blocks(spec, q, k)
    row = np.zeros(PLACES, np.int32)
    row[: sum(LENGTHS)] = np.repeat(np.arange(1, len(LENGTHS) + 1), LENGTHS)
    some, every = _blocks(spec, row, sizes)
    whole, _ = _blocks(spec, np.ones_like(row), sizes)
    canvas, scale = Canvas(), SIDE / PLACES
    for i, j in np.ndindex(some.shape):
        left, top = LEFT + j * sizes.kv * scale, TOP + i * sizes.q * scale
        colour = FULL if every[i, j] else MASKED if some[i, j] else NOT_VISITED
        canvas.box(left, top, left + sizes.kv * scale, top + sizes.q * scale, colour)
    _segments(canvas, scale)
    _legend(canvas, some, every, int(whole.sum()), sizes)
    return canvas


def _blocks(spec: AttentionSpec, row: np.ndarray, sizes: tuning.Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of a row are visited, and which of these are visible as a whole."""
    ids = jnp.asarray(row)[None]
    some, every = blocks.visited(spec, ids, ids, jnp.zeros(1, int), sizes.q, sizes.kv)
    return np.asarray(some[0]), np.asarray(every[0])


def _segments(canvas: Canvas, scale: float) -> None:
    """Bars along both edges, and the triangle of pairs that each segment makes visible."""
    canvas.words(LEFT + SIDE / 2, TOP - BAR - 15, "keys of the row", colour=QUIET, anchor="mm")
    canvas.upward(LEFT - BAR - 15, TOP + SIDE / 2, "queries of the row", colour=QUIET)
    end = 0
    for number, length in enumerate([*LENGTHS, PLACES - sum(LENGTHS)], 1):
        begin, end = end, end + length
        low, high, middle = begin * scale, end * scale, (begin + end) / 2 * scale
        is_padding = number > len(LENGTHS)
        colour = UNUSED if is_padding else BARS[number % 2]
        canvas.box(LEFT + low, TOP - BAR - 2, LEFT + high, TOP - 2, colour)
        canvas.box(LEFT - BAR - 2, TOP + low, LEFT - 2, TOP + high, colour)
        words = {"size": 11, "colour": QUIET} if is_padding else {"size": 12}
        text = "padding" if is_padding else str(number)
        canvas.words(LEFT + middle, TOP - BAR / 2 - 2, text, anchor="mm", **words)
        if is_padding:
            canvas.upward(LEFT - BAR / 2 - 2, TOP + middle, text, **words)
        else:
            canvas.words(LEFT - BAR / 2 - 2, TOP + middle, text, anchor="mm", **words)
            canvas.line([(LEFT + x, TOP + y) for x, y in ((low, low), (low, high), (high, high))], BORDER, 1.5)


def _legend(canvas: Canvas, some: np.ndarray, every: np.ndarray, causal: int, sizes: tuning.Blocks) -> None:
    """What the colours mean and how many blocks have them; ``causal`` blocks touch the lower triangle."""
    x, y = LEFT + SIDE + 26, TOP + 10
    canvas.words(x, y, "One packed row", size=19)
    lines = [f"{PLACES:,} places, {len(LENGTHS)} conversations,", f"{PLACES - sum(LENGTHS)} places of padding"]
    lines += [f"blocks of {sizes.q} queries x {sizes.kv} keys"]
    for step, line in enumerate(lines):
        canvas.words(x, y + 28 + 21 * step, line, colour=QUIET)
    kinds = [(FULL, every, "visited, no mask needed"), (MASKED, some & ~every, "visited, with a mask")]
    for step, (colour, which, text) in enumerate([*kinds, (NOT_VISITED, ~some, "not visited")]):
        at = y + 124 + 50 * step
        canvas.box(x, at - 10, x + 40, at + 10, colour)
        canvas.words(x + 50, at - 9, f"{which.sum()} blocks")
        canvas.words(x + 50, at + 10, text, size=14, colour=QUIET)
    at = y + 124 + 150
    canvas.line([(x + 9, at - 10), (x + 9, at + 10), (x + 31, at + 10)], BORDER, 1.5)
    canvas.words(x + 50, at - 9, "one conversation")
    canvas.words(x + 50, at + 10, "its visible pairs", size=14, colour=QUIET)
    at += 62
    canvas.words(x, at, f"{some.sum()} of {some.size} blocks visited", size=17)
    canvas.words(x, at + 24, f"a causal mask alone leaves {causal}", colour=QUIET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path, default=TARGET, help="picture to write (default: %(default)s)")
    draw().saved(parser.parse_args().target)


if __name__ == "__main__":
    main()

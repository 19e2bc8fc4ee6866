"""Draw the blocks of scores that segment attention computes for one packed causal sequence: kernels/block_pairs.png.

    python tools/draw_block_pairs.py

Block sizes are those of the TPU kernel for a decoder of 32 query and 8 key heads of 128. Coordinates are in pixels of
the width at which the figure is shown; it is drawn at a higher resolution and scaled down.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jvlm_kernels.attention import block_pairs, tuning
from jvlm_kernels.attention.api import AttentionSpec
from PIL import Image, ImageDraw, ImageFont

TARGET = Path(__file__).parents[1] / "kernels/block_pairs.png"
SEGMENTS = (620, 1480, 300, 2730, 390, 880, 420, 560)
LENGTH = 8192
HEADS, KEY_HEADS, HEAD_SIZE = 32, 8, 128

WIDTH, HEIGHT, SAVED, DRAWN = 900, 640, 2, 4  # and pixels saved and drawn for each of them
LEFT, TOP, SIDE = 56, 52, 560  # of the matrix
BAR = 16  # of the segments along its edges
INK, QUIET, PAPER = (38, 46, 60), (112, 121, 136), (255, 255, 255)
SKIPPED, PARTIAL, FULL, BORDER = (238, 240, 244), (158, 197, 240), (43, 108, 184), (217, 92, 24)
BARS, PADDING = ((202, 208, 218), (226, 230, 237)), (246, 247, 249)


class Canvas:
    """A figure, drawn with coordinates in pixels as shown."""

    def __init__(self):
        self.image = Image.new("RGB", (WIDTH * DRAWN, HEIGHT * DRAWN), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, colour) -> None:
        """Draw a filled rectangle with a white hairline around it."""
        corners = [round(x * DRAWN) for x in (left, top, right, bottom)]
        self._draw.rectangle(corners, fill=colour, outline=PAPER, width=DRAWN // 2)

    def line(self, points: list[tuple[float, float]], colour, width: float) -> None:
        """Draw a closed line."""
        scaled = [(x * DRAWN, y * DRAWN) for x, y in [*points, *points[:2]]]
        self._draw.line(scaled, fill=colour, width=round(width * DRAWN), joint="curve")

    def text(self, x: float, y: float, text: str, *, size: int = 15, colour=INK, anchor: str = "lm") -> None:
        """Draw text; ``anchor`` as in Pillow."""
        font = ImageFont.load_default(size * DRAWN)
        self._draw.text((x * DRAWN, y * DRAWN), text, fill=colour, font=font, anchor=anchor)

    def vertical_text(self, x: float, y: float, text: str, *, size: int = 15, colour=INK) -> None:
        """Draw text rotated by 90 degrees, around its middle."""
        font = ImageFont.load_default(size * DRAWN)
        long, high = round(font.getlength(text)), 2 * size * DRAWN
        mask = Image.new("L", (long, high))
        ImageDraw.Draw(mask).text((long / 2, high / 2), text, fill=255, font=font, anchor="mm")
        corner = round(x * DRAWN - high / 2), round(y * DRAWN - long / 2)
        self.image.paste(colour, corner, mask.rotate(90, expand=True))

    def save(self, path: Path) -> None:
        """Write the figure as a PNG of few colours."""
        scaled = self.image.resize((WIDTH * SAVED, HEIGHT * SAVED), Image.Resampling.LANCZOS)
        scaled.quantize(48, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)


def draw() -> Canvas:
    """Return the figure: the matrix of blocks, queries down and keys across, and its legend."""
    spec = AttentionSpec(True, None, HEAD_SIZE**-0.5, None)
    q, k = (jax.ShapeDtypeStruct((1, LENGTH, heads, HEAD_SIZE), jnp.bfloat16) for heads in (HEADS, KEY_HEADS))
    sizes = tuning.tpu_blocks(spec, q, k)
    ids = np.zeros(LENGTH, np.int32)
    ids[: sum(SEGMENTS)] = np.repeat(np.arange(1, len(SEGMENTS) + 1), SEGMENTS)
    needed, full = _block_mask(spec, ids, sizes)
    causal, _ = _block_mask(spec, np.ones_like(ids), sizes)
    canvas, scale = Canvas(), SIDE / LENGTH
    for i, j in np.ndindex(needed.shape):
        left, top = LEFT + j * sizes.kv * scale, TOP + i * sizes.q * scale
        colour = FULL if full[i, j] else PARTIAL if needed[i, j] else SKIPPED
        canvas.box(left, top, left + sizes.kv * scale, top + sizes.q * scale, colour)
    _segments(canvas, scale)
    _legend(canvas, needed, full, int(causal.sum()), sizes)
    return canvas


def _block_mask(spec: AttentionSpec, ids: np.ndarray, sizes: tuning.BlockSizes) -> tuple[np.ndarray, np.ndarray]:
    """Return (needed, full) of the blocks of one sequence."""
    ids = jnp.asarray(ids)[None]
    needed, full = block_pairs.block_mask(spec, ids, ids, jnp.zeros(1, int), sizes.q, sizes.kv)
    return np.asarray(needed[0]), np.asarray(full[0])


def _segments(canvas: Canvas, scale: float) -> None:
    """Draw bars along both edges, and the triangle of scores that each segment makes visible."""
    canvas.text(LEFT + SIDE / 2, TOP - BAR - 15, "keys of the sequence", colour=QUIET, anchor="mm")
    canvas.vertical_text(LEFT - BAR - 15, TOP + SIDE / 2, "queries of the sequence", colour=QUIET)
    end = 0
    for number, length in enumerate([*SEGMENTS, LENGTH - sum(SEGMENTS)], 1):
        begin, end = end, end + length
        low, high, middle = begin * scale, end * scale, (begin + end) / 2 * scale
        is_padding = number > len(SEGMENTS)
        colour = PADDING if is_padding else BARS[number % 2]
        canvas.box(LEFT + low, TOP - BAR - 2, LEFT + high, TOP - 2, colour)
        canvas.box(LEFT - BAR - 2, TOP + low, LEFT - 2, TOP + high, colour)
        words = {"size": 11, "colour": QUIET} if is_padding else {"size": 12}
        text = "padding" if is_padding else str(number)
        canvas.text(LEFT + middle, TOP - BAR / 2 - 2, text, anchor="mm", **words)
        if is_padding:
            canvas.vertical_text(LEFT - BAR / 2 - 2, TOP + middle, text, **words)
        else:
            canvas.text(LEFT - BAR / 2 - 2, TOP + middle, text, anchor="mm", **words)
            canvas.line([(LEFT + x, TOP + y) for x, y in ((low, low), (low, high), (high, high))], BORDER, 1.5)


def _legend(canvas: Canvas, needed: np.ndarray, full: np.ndarray, causal: int, sizes: tuning.BlockSizes) -> None:
    """Explain the colours and count their blocks; ``causal`` blocks touch the lower triangle."""
    x, y = LEFT + SIDE + 26, TOP + 10
    canvas.text(x, y, "One packed sequence", size=19)
    lines = [f"{LENGTH:,} tokens, {len(SEGMENTS)} conversations,", f"{LENGTH - sum(SEGMENTS)} tokens of padding"]
    lines += [f"blocks of {sizes.q} queries x {sizes.kv} keys"]
    for step, line in enumerate(lines):
        canvas.text(x, y + 28 + 21 * step, line, colour=QUIET)
    kinds = [(FULL, full, "computed, no mask"), (PARTIAL, needed & ~full, "computed, with a mask")]
    for step, (colour, which, text) in enumerate([*kinds, (SKIPPED, ~needed, "skipped")]):
        at = y + 124 + 50 * step
        canvas.box(x, at - 10, x + 40, at + 10, colour)
        canvas.text(x + 50, at - 9, f"{which.sum()} blocks")
        canvas.text(x + 50, at + 10, text, size=14, colour=QUIET)
    at = y + 124 + 150
    canvas.line([(x + 9, at - 10), (x + 9, at + 10), (x + 31, at + 10)], BORDER, 1.5)
    canvas.text(x + 50, at - 9, "one conversation")
    canvas.text(x + 50, at + 10, "its visible scores", size=14, colour=QUIET)
    at += 62
    canvas.text(x, at, f"{needed.sum()} of {needed.size} blocks computed", size=17)
    canvas.text(x, at + 24, f"a causal mask alone leaves {causal}", colour=QUIET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path, default=TARGET, help="figure to write (default: %(default)s)")
    draw().save(parser.parse_args().target)


if __name__ == "__main__":
    main()

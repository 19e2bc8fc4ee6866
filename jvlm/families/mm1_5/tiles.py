"""Dynamic image splitting (AnyRes) as MM1.5 publishes it, arXiv 2409.20566, Eq. (1): one image into square tiles.

Sizes are (height, width); a grid is (rows, columns); ``side`` is that of a tile, all in pixels. Ties, the loss of a
downscaled image and the side of the padding are not published: the functions say what is done here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from PIL import Image

from jvlm.errors import UserError

Grid = tuple[int, int]
Placement = Literal["corner", "centre"]
Colour = tuple[int, int, int]


@functools.cache
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """Every grid of min_tiles to max_tiles tiles: 18 of them for 4 to 9."""
    if not 1 <= min_tiles <= max_tiles:
        raise UserError(f"min_tiles {min_tiles} and max_tiles {max_tiles}: need 1 <= min_tiles <= max_tiles")
    rows = range(1, max_tiles + 1)
    return tuple((r, c) for r in rows for c in range(1, max_tiles // r + 1) if r * c >= min_tiles)


def scale_to(size: tuple[int, int], grid: Grid, side: int, max_upscale: float | None = None) -> Fraction:
    """Return what an image is multiplied by to fit a grid with its aspect kept, at most ``max_upscale``."""
    scale = min(Fraction(n * side, length) for n, length in zip(grid, size, strict=True))
    return scale if max_upscale is None else min(scale, max(Fraction(max_upscale), Fraction(1)))


def choose_grid(size: tuple[int, int], side: int, grids: Sequence[Grid], max_upscale: float | None = None) -> Grid:
    """Return the grid of an image.

    Among the grids that hold the image without shrinking it, the one with the least padding; if none does, the one
    that shrinks it least. Ties go to less padding, then to fewer tiles, then to the earlier grid.

    Args:
      max_upscale: images are enlarged by no more than this. The published rule has no such limit and spends up to 16
        times as many pixels as a small image has; with one, padding counts against grids that are too large.
    """

    def cost(grid: Grid) -> tuple[bool, Fraction, Fraction, int]:
        scale = scale_to(size, grid, side, max_upscale)
        tiles = grid[0] * grid[1]
        padding = tiles * side**2 - size[0] * size[1] * scale**2
        return scale < 1, -scale if scale < 1 else Fraction(0), padding, tiles

    return min(grids, key=cost)


def fitted_size(size: tuple[int, int], grid: Grid, side: int, max_upscale: float | None = None) -> tuple[int, int]:
    """(height, width) of an image on a grid, before padding."""
    scale = scale_to(size, grid, side, max_upscale)
    height, width = (min(max(round(length * scale), 1), n * side) for n, length in zip(grid, size, strict=True))
    return height, width


def split(
    image: Image.Image,
    grid: Grid,
    side: int,
    *,
    max_upscale: float | None = None,
    placement: Placement = "corner",
    colour: Colour = (0, 0, 0),
) -> list[Image.Image]:
    """Return the tiles of an image in rows from the top, each side x side, the rest of the grid filled with ``colour``.

    Args:
      placement: the image's own: in the top left corner, or centred.
    """
    height, width = fitted_size((image.height, image.width), grid, side, max_upscale)
    canvas = Image.new("RGB", (grid[1] * side, grid[0] * side), colour)
    free = canvas.width - width, canvas.height - height
    at = (free[0] // 2, free[1] // 2) if placement == "centre" else (0, 0)
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), at)
    corners = [(c * side, r * side) for r in range(grid[0]) for c in range(grid[1])]
    return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]

"""The resize to multiples of a patch within limits of pixels, which several families share.

Source: transformers' image processor of Qwen2-VL.
"""

from __future__ import annotations

import math

from jvlm.errors import UserError

MAX_ASPECT = 200  # of an image that `smart_resize` takes


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """Return (height, width) as multiples of ``factor`` with min_pixels <= area <= max_pixels, keeping the aspect.

    As in transformers >= 4.53: Python's rounding, and sides clamped to ``factor`` when shrinking.

    Raises:
      UserError: an aspect ratio above 200, or limits that contradict each other.
    """
    if min_pixels > max_pixels:
        raise UserError(f"min_pixels {min_pixels} exceeds max_pixels {max_pixels}")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(f"aspect ratio of {width} x {height} exceeds {MAX_ASPECT}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def largest_area(factor: int, min_pixels: int, max_pixels: int) -> int:
    """Return the most pixels that `smart_resize` gives any image.

    That is more than ``max_pixels`` where a thin image, brought down, keeps a side of ``factor``, and where a small
    one, brought up, has both its sides rounded up past limits that are close to each other.
    """
    most = int(max_pixels)
    thin = int(math.sqrt(MAX_ASPECT * max_pixels) / factor)
    cells = max(most // factor**2, thin)
    longest = int(math.sqrt(MAX_ASPECT * min_pixels) / factor) + 1
    for short in range(1, int(math.sqrt(min_pixels) / factor) + 2):
        # one more than the exact quotient: the sides are computed in float64 before they are rounded up
        long = longest if short == 1 else min(longest, int(min_pixels / ((short - 1) * factor**2)) + 1)
        cells = max(cells, short * long)
    return max(most, cells * factor**2)

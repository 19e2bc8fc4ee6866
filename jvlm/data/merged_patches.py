"""Pixels of images as patches of one size in groups that are merged, as encoders of the Qwen2-VL kind take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageChops

from jvlm.data.recycled import scratch

_PROBE = (32, 32)  # pixels that are looked at first to tell a grey image


def write_merged(
    images: Sequence[Image.Image],
    size: tuple[int, int],
    resample: Image.Resampling,
    out: UInt8[np.ndarray, "n c"],
    *,
    patch: int,
    merge: int,
    frames: int,
    order: Int[np.ndarray, " cells"] | None = None,
) -> None:
    """Resize frames and write their patches: (time, cell, row and column in the cell), each (channel, frame, y, x).

    Lines of pixels of a patch, and then patches of a channel, are moved as single items, and between arrays that are
    there already: byte by byte numpy takes three times as long, and new memory as long again.

    Args:
      size: (width, height) to resize to, whole cells.
      patch: side of a patch in pixels.
      merge: side of a cell in patches.
      frames: of a patch; the last one of the video is repeated where it is incomplete.
      order: of the cells of a time, by number in raster order; None is raster order.
    """
    width, height = size
    p, m = patch, merge
    h, w = height // (p * m), width // (p * m)
    cells, inner = h * w, m * m
    channels = out.shape[1] // (frames * p * p)
    line, square = np.dtype((np.void, p)), np.dtype((np.void, p * p))
    order = np.arange(cells) if order is None else order
    for time, start in enumerate(range(0, len(images), frames)):
        given = images[start : start + frames]
        squares = scratch("squares", (len(given) * cells * inner * channels, p * p))
        # which square each (cell, row and column in it, channel, frame) of the patches is
        source = np.empty((cells, inner, channels, frames), np.intp)
        for place, image in enumerate(given):
            bands = _resized_bands(image, size, resample)
            first, count = place * cells * inner * channels, len(bands)
            # (h, w, mh, mw, C, y): cells in raster order
            lines = squares[first : first + cells * inner * count].view(line).reshape(h, w, m, m, count, p)
            for channel, band in enumerate(bands):
                # from (h, mh, y, w, mw)
                pixels = np.asarray(band, np.uint8).view(line).reshape(h, m, p, w, m)
                lines[..., channel, :] = pixels.transpose(0, 3, 1, 4, 2)
            # of a grey image, one band is all its channels
            of_cell = np.arange(inner)[:, None] * count + np.arange(channels) % count
            number = first + order[:, None, None] * (inner * count) + of_cell
            source[..., place:] = number[..., None]
        patches = out[time * cells * inner : (time + 1) * cells * inner]
        np.take(squares.view(square)[:, 0], source, out=patches.view(square).reshape(source.shape), mode="clip")


def _resized_bands(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> tuple[Image.Image, ...]:
    """Resize an image and return its channels; one alone where all are equal, which takes a third of the time."""
    grey = _grey(image)
    if grey is not None:
        return (grey if grey.size == size else grey.resize(size, resample),)
    return (image if image.size == size else image.resize(size, resample)).split()


def _grey(image: Image.Image) -> Image.Image | None:
    """Return the first channel of an image whose channels are equal."""
    probe = np.asarray(image.resize(_PROBE, Image.Resampling.NEAREST)).reshape(_PROBE[0] * _PROBE[1], -1)
    if (probe[:, 1:] != probe[:, :1]).any():
        return None
    first, *others = image.split()
    if any(ImageChops.difference(first, other).getbbox() is not None for other in others):
        return None
    return first

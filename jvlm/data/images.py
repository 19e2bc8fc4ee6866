"""Pictures from whatever a row holds, and the resize rule of Qwen2-VL / Qwen2.5-VL."""

from __future__ import annotations

import base64
import io
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jvlm.data.errors import Origin, RowError

# What Pillow raises for damaged files, in pixels or in EXIF.
_UNDECODABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    SyntaxError,
    LookupError,
    struct.error,
)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) as multiples of ``factor`` with min_pixels <= area <= max_pixels, keeping the aspect.

    As in transformers >= 4.53: Python's rounding, and sides clamped to ``factor`` when shrinking.

    Raises:
      ValueError: an aspect ratio above 200, or limits that contradict each other.
    """
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels {min_pixels} exceeds max_pixels {max_pixels}")
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"aspect ratio of {width} x {height} exceeds 200")
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


def open_image(
    source: Any, *, origin: Origin = Origin(), field: str = "images", roots: tuple[str, ...] = ()
) -> Image.Image:
    """An RGB picture from a path, bytes, ``data:`` URI, ``{"bytes", "path"}``, PIL image or uint8 array.

    Relative paths are looked up in ``roots`` (the data file's folder first). Transparency is laid on white, as
    qwen-vl-utils does, and EXIF rotation is applied, as transformers does.

    Raises:
      RowError: not found (naming the places tried), not decodable, or not an image.
    """
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path") or source.get("url")
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, np.ndarray):
            image = _from_array(source)
        elif isinstance(source, bytes | bytearray):
            image = Image.open(io.BytesIO(source))
        elif isinstance(source, str | Path) and str(source).startswith("data:"):
            image = Image.open(io.BytesIO(base64.b64decode(str(source).partition("base64,")[2], validate=True)))
        elif isinstance(source, str | Path):
            image = Image.open(find_file(str(source), roots, origin, field))
        else:
            raise RowError(
                origin, field, f"a {type(source).__name__} is not a picture", "Give a path, bytes, image or array"
            )
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except RowError:
        raise
    except _UNDECODABLE as error:
        shown = source if isinstance(source, str | Path) else type(source).__name__
        raise RowError(
            origin, field, f"{str(shown)[:200]} cannot be decoded ({error})", "Replace or remove the picture"
        ) from error


def find_file(path: str, roots: tuple[str, ...], origin: Origin, field: str) -> Path:
    """The media file of a row: absolute, or relative to one of ``roots``. Raises RowError naming the places tried."""
    if path.startswith(("http://", "https://")):
        raise RowError(origin, field, f"{path} is a URL", "jvlm reads no network at run time: download it first")
    path = path.removeprefix("file://")
    tried = [Path(path)] if Path(path).is_absolute() else [Path(root) / path for root in (*roots, ".")]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    places = ", ".join(dict.fromkeys(str(p) for p in tried))
    raise RowError(origin, field, f"file not found; tried {places}", "Correct the path or set data.media_root")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise ValueError(f"array of {array.dtype} {array.shape}, expected uint8 [height, width, 3]")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")

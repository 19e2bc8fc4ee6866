"""What the processes that decode images run. Their memory and time are limited: what they read comes from strangers."""

from __future__ import annotations

import io
import math
import resource
import warnings
from typing import NamedTuple

from PIL import Image

from jvlm.data.pixels import image_to_rgb
from jvlm.data.video import decoding

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_MORE_MEMORY = 3 * 2**29  # beside what the process has when it begins
_CPU_SECONDS = 3600


class Decoded(NamedTuple):
    """An image: its size, and RGB bytes; ``problem`` says why there is none."""

    size: tuple[int, int]
    pixels: bytes
    problem: str = ""


def begin(most_pixels: int) -> None:
    """Limit this process."""
    Image.MAX_IMAGE_PIXELS = most_pixels  # Pillow warns above it: an error here
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.preinit()
    _limit_process()


def begin_videos(most_pixels: int) -> None:
    """Limit a process that decodes videos."""
    decoding.begin()
    begin(most_pixels)


def _limit_process() -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, now + _MORE_MEMORY)
    _limit(resource.RLIMIT_CPU, _CPU_SECONDS)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(kind, (most, most))


def decode_image(content: bytes, most_pixels: int, side: int, shrink_to: int | None) -> Decoded:
    """Return an image, of an animation the first frame. The header is read before any pixel is.

    Args:
      most_pixels, side: what is larger is not decoded.
      shrink_to: it is made smaller to have at most so many pixels.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > most_pixels or max(width, height) > side:
                return Decoded((width, height), b"", f"{width} x {height} pixels are more than allowed")
            rgb = image_to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return Decoded((0, 0), b"", "it has more pixels than allowed")
    except MemoryError:
        return Decoded((0, 0), b"", "it takes too much memory")
    except Exception:  # noqa: BLE001  (Pillow lets through whatever a damaged file makes its decoders raise)
        return Decoded((0, 0), b"", "it is no image of a known kind, or damaged")
    if shrink_to is not None and rgb.width * rgb.height > shrink_to:
        scale = math.sqrt(shrink_to / (rgb.width * rgb.height))
        size = max(int(rgb.width * scale), 1), max(int(rgb.height * scale), 1)
        rgb = rgb.resize(size, Image.Resampling.BICUBIC)
    return Decoded(rgb.size, rgb.tobytes())

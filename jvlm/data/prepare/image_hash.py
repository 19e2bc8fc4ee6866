"""Images that look alike: a perceptual hash that finds candidates, and a second look at the images themselves.

The hash is pHash, bit for bit that of the library imagehash. Pages and screens made from one template have nearly the
same hash, so that it alone would take different receipts for one. The second look compares the images place by place.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import scipy.fft
import scipy.ndimage
from jaxtyping import Float, Int, UInt64
from PIL import Image

HashBits = Literal[64, 256]
# most bits in which the hashes of candidates differ; data.md's measurements: JPEG, scaling and brightness stay below
MAX_DISTANCE: dict[int, int] = {64: 8, 256: 24}
_LOOK_SIDE = 1024
_WINDOW = 9  # pixels, about a letter of a page that is 1024 high
_BLUR = 0.7  # pixels: scaling moves edges by a part of one
_CONTRAST = 15.0  # standard deviation, of 255, from which on a place has something to compare
_LEAST_CORRELATION = 0.7
_MOST_ASPECT = 1.03
_MOST_GREY, _MOST_COLOUR = 12.0, 10.0
_MOST_COLOUR_OF_A_PLACE = 40.0  # of 16 by 16: a thing of another colour, which the mean of all hides


def perceptual_hash(image: Image.Image, bits: HashBits = 256) -> UInt64[np.ndarray, " words"]:
    """Return pHash as words of 64 bits, most significant bit first, as imagehash.phash has it.

    Args:
      bits: 64 for photos; 256 tells pages apart better.
    """
    side = {64: 8, 256: 16}[bits]
    grey = image.convert("L").resize((4 * side, 4 * side), Image.Resampling.LANCZOS)
    pixels = np.asarray(grey, np.float64)
    low = scipy.fft.dct(scipy.fft.dct(pixels, axis=0), axis=1)[:side, :side]
    return np.packbits((low > np.median(low)).ravel()).view(">u8").astype(np.uint64)


def distance(a: UInt64[np.ndarray, "*n w"], b: UInt64[np.ndarray, "*m w"]) -> Int[np.ndarray | np.integer, "..."]:
    """Return in how many bits hashes differ."""
    return np.bitwise_count(a ^ b).sum(axis=-1, dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class ImageHash:
    """The perceptual hash of an image, and its (width, height)."""

    words: UInt64[np.ndarray, " words"]
    size: tuple[int, int]

    @classmethod
    def of(cls, image: Image.Image) -> ImageHash:
        """Return the hash of an image, of 256 bits."""
        return cls(perceptual_hash(image), image.size)


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """What the second look sees of an image.

    Attributes:
      size: (width, height) of the image.
      grey: at most 1024 pixels long.
      colour: Cb and Cr of 16 by 16 places.
    """

    size: tuple[int, int]
    grey: Image.Image
    colour: Float[np.ndarray, "16 16 2"]

    @classmethod
    def of(cls, image: Image.Image) -> Thumbnail:
        """Return the thumbnail of an RGB image."""
        size = _fitted(image.size, _LOOK_SIDE)
        small = image.convert("RGB").resize(size, Image.Resampling.BOX, reducing_gap=2.0)
        colour = small.resize((16, 16), Image.Resampling.BOX).convert("YCbCr")
        return cls(image.size, small.convert("L"), np.asarray(colour, np.float64)[..., 1:])


@dataclasses.dataclass(frozen=True)
class Look:
    """What a second look found.

    Attributes:
      same: whether the images show the same.
      correlation: of the place where they are least alike, -1 to 1; 1 if neither has any detail.
      why: what differs, "" if nothing does.
    """

    same: bool
    correlation: float
    why: str = ""


def same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether images of these (width, height) can show the same: their aspect ratios are within 3 %."""
    aspects = sorted((a[0] * b[1], a[1] * b[0]))
    return aspects[1] <= _MOST_ASPECT * aspects[0]


def second_look(a: Thumbnail, b: Thumbnail) -> Look:
    """Compare two images: shape, colour, and in every place with any detail the pattern of the pixels.

    Correlation within small windows is the same for a picture that is lighter, has more contrast, was scaled or
    compressed; other words in the same place correlate no more than chance. What differs only in less than a letter of
    a page that is 512 pixels high is not told apart.
    """
    if not same_shape(a.size, b.size):
        return Look(False, 0.0, f"{a.size[0]}x{a.size[1]} and {b.size[0]}x{b.size[1]} have other shapes")
    colour = float(np.abs(a.colour - b.colour).mean())
    if colour > _MOST_COLOUR:
        return Look(False, 0.0, f"colours differ by {colour:.1f} of 255")
    place = float(np.abs(a.colour - b.colour).mean(axis=-1).max())
    if place > _MOST_COLOUR_OF_A_PLACE:
        return Look(False, 0.0, f"the colour of one place differs by {place:.1f} of 255")
    size = min(a.grey.size, b.grey.size, key=lambda size: size[0] * size[1])
    x, y = (
        scipy.ndimage.gaussian_filter(np.asarray(one.grey.resize(size, Image.Resampling.BOX), np.float64), _BLUR)
        for one in (a, b)
    )

    def mean(values: np.ndarray) -> np.ndarray:
        return scipy.ndimage.uniform_filter(values, _WINDOW, mode="reflect")

    mean_x, mean_y = mean(x), mean(y)
    deviation_x = np.sqrt(np.maximum(mean(x * x) - mean_x**2, 0))
    deviation_y = np.sqrt(np.maximum(mean(y * y) - mean_y**2, 0))
    detailed = np.maximum(deviation_x, deviation_y) > _CONTRAST
    if not detailed.any():
        grey = float(np.abs(x - y).mean())
        return Look(grey <= _MOST_GREY, 1.0, "" if grey <= _MOST_GREY else f"greys differ by {grey:.1f} of 255")
    product = np.maximum(deviation_x * deviation_y, _CONTRAST**2 / 2)
    correlation = float(((mean(x * y) - mean_x * mean_y) / product)[detailed].min())
    same = correlation >= _LEAST_CORRELATION
    return Look(same, correlation, "" if same else f"least alike place correlates {correlation:.2f}")


def _fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

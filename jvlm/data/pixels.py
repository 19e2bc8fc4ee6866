"""Any image or array to 8-bit RGB, where Pillow alone would cut values off.

How values become 0..255:

- 8 bits: as they are. True and false: 255 and 0.
- 16 bits (grey PNG and TIFF, uint16): value / 257, rounded. Of 12-bit TIFFs white is 4095.
- Whole numbers of more bits, or signed: as they are up to 255, else as 16 bits up to 65535. Others are refused: nothing
  says what is white.
- Floats: 0..1 times 255, or 0..255 as they are, rounded. Others, NaN and infinity are refused; so are images whose
  highest value is between 1 and 2: they would come out black or cut off.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import ExifTags, Image, ImageOps

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_WHITE_IS_ZERO = 0
ORIENTATION = ExifTags.Base.Orientation
_CHANNELS = (1, 2, 3, 4)  # grey or RGB, with or without transparency


def image_to_rgb(image: Image.Image) -> Image.Image:
    """Return an RGB image, the same where nothing has to change: rotated as its EXIF says, transparency on white.

    Raises:
      ValueError: no pixels, or values that nothing says how to scale.
    """
    image.load()
    if 0 in image.size:
        raise ValueError(f"no pixels: {image.width} x {image.height}")
    tags, white = getattr(image, "tag_v2", {}), _white(image)
    # without a rotation, it would copy the image
    upright = ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) in range(2, 9) else image
    if upright.mode.startswith(("I", "F")):
        values = np.asarray(upright)
        grey = to_8_bits(values, white)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 255 - grey
        if isinstance(colour := image.info.get("transparency"), int):
            grey = np.where(values == colour, np.uint8(255), grey)
        upright = Image.fromarray(grey)
    return _on_white(upright)


def array_to_rgb(array: Shaped[np.ndarray, "..."]) -> Image.Image:
    """Return an RGB image of [height, width], [height, width, 1 to 4 channels], or [1 or 3 channels, height, width].

    Raises:
      ValueError: another shape or type, or values that nothing says how to scale.
    """
    given, array = f"array of {array.dtype} {array.shape}", np.asarray(array)
    if array.ndim == 3 and array.shape[-1] not in _CHANNELS and array.shape[0] in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in _CHANNELS):
        raise ValueError(f"{given}, expected [height, width, 3]")
    if not array.size:
        raise ValueError(f"{given} has no pixels")
    try:
        pixels = to_8_bits(array)
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from error
    if array.ndim == 3 and array.shape[-1] == 1:
        pixels = pixels[..., 0]
    return _on_white(Image.fromarray(np.ascontiguousarray(pixels)))


def to_8_bits(values: Shaped[np.ndarray, "*L"], white: int | None = None) -> UInt8[np.ndarray, "*L"]:
    """uint8 values by the rules of this module.

    Args:
      white: the value of white, where the file tells it.

    Raises:
      ValueError: values that nothing says how to scale; names the lowest and the highest.
    """
    kind = values.dtype.kind
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return values
    if kind not in "iuf":
        raise ValueError(f"values of type {values.dtype} are no pixels")
    if not np.isfinite(values).all():
        raise ValueError("NaN or infinity among the pixels")
    low, high = values.min().item(), values.max().item()
    if kind == "u" and values.dtype.itemsize == 2 and white is None:
        white = 65535
    most = white or (65535 if kind in "iu" else 255)
    if low < 0 or high > most or (kind == "f" and 1 < high < 2):
        ranges = f"0 to {white}" if white else "0 to 255 or 65535" if kind in "iu" else "0 to 1 or 255"
        raise ValueError(f"pixels from {low} to {high} are not within {ranges}: scale them")
    if kind == "f":
        exact = values.astype(np.result_type(values, np.float32))
        return np.rint(exact * 255 if high <= 1 else exact).astype(np.uint8)
    white = white or (255 if high <= 255 else 65535)
    return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _white(image: Image.Image) -> int | None:
    """Return the value of white in a file of more than 8 bits, where it is known."""
    if image.mode.startswith("I;"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
        return 2 ** bits[0] - 1
    # Pillow scales a PGM of more than 8 bits to 16
    return 65535 if image.mode == "I" and image.format == "PPM" else None


def _on_white(image: Image.Image) -> Image.Image:
    colour = image.info.get("transparency")
    if image.mode == "RGB" and (colour is None or not isinstance(colour, tuple) or max(colour) > 255):
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")

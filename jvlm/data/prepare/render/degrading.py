"""Scenes as a scanner, a camera or a messenger leaves them: turned a little, blurred, noisy, compressed again.

Boxes go with the image: that of a part which is turned holds all of it.
"""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
from PIL import Image, ImageFilter

from jvlm.data.prepare.regions import Region, Scene

_MOST_DEGREES, _MOST_BLUR, _MOST_NOISE = 4.0, 1.3, 14.0
_QUALITY = (25, 86)


def degraded(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene with each of the four done to it with probability one half; it is a JPEG in any case."""
    with Image.open(io.BytesIO(scene.image)) as opened:
        image = opened.convert("RGB")
    angle, radius, noise = (
        rng.uniform(*one) for one in ((-_MOST_DEGREES, _MOST_DEGREES), (0.3, _MOST_BLUR), (2.0, _MOST_NOISE))
    )
    turns, blurs, is_noisy = rng.random(3) < 0.5
    regions = scene.regions
    if turns:
        image, regions = turned(image, regions, angle)
    if blurs:
        image = image.filter(ImageFilter.GaussianBlur(radius))
    if is_noisy:
        pixels = np.asarray(image, np.float32) + rng.normal(0, noise, (image.height, image.width, 1))
        image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(*_QUALITY)) if rng.random() < 0.5 else 95)
    return dataclasses.replace(scene, image=file.getvalue(), size=image.size, regions=regions)


def turned(image: Image.Image, regions: tuple[Region, ...], degrees: float) -> tuple[Image.Image, tuple[Region, ...]]:
    """Return an image turned counterclockwise, as large as it then has to be, with the boxes of its parts.

    What comes in at the corners has the median colour of the image's edge.
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    width, height = image.size
    new_width = math.ceil(width * abs(cos) + height * abs(sin))
    new_height = math.ceil(width * abs(sin) + height * abs(cos))

    def moved(x: float, y: float) -> tuple[float, float]:
        # y points down: counterclockwise to the eye
        x, y = x - width / 2, y - height / 2
        return x * cos + y * sin + new_width / 2, -x * sin + y * cos + new_height / 2

    def box(region: Region) -> Region:
        x1, y1, x2, y2 = region.box
        xs, ys = zip(*(moved(x, y) for x in (x1, x2) for y in (y1, y2)), strict=True)
        return dataclasses.replace(region, box=(min(xs), min(ys), max(xs), max(ys)))

    # Pillow wants where each pixel of the new image comes from
    back = (cos, -sin, width / 2 - cos * new_width / 2 + sin * new_height / 2)
    down = (sin, cos, height / 2 - sin * new_width / 2 - cos * new_height / 2)
    new = image.transform(
        (new_width, new_height),
        Image.Transform.AFFINE,
        (*back, *down),
        resample=Image.Resampling.BICUBIC,
        fillcolor=_edge_colour(image),
    )
    return new, tuple(map(box, regions))


def _edge_colour(image: Image.Image) -> tuple[int, int, int]:
    pixels = np.asarray(image)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return tuple(int(v) for v in np.median(edge, axis=0))

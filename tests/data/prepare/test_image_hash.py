"""The hash is imagehash's; the second look keeps apart what the hash alone does not."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from jvlm.data.prepare.image_hash import MAX_DISTANCE, Thumbnail, distance, perceptual_hash, second_look

GOLDEN = Path(__file__).parents[2] / "golden"
PHOTOS = ("skimage_chelsea.png", "skimage_coffee.png", "skimage_page.png")


def _open(name: str) -> Image.Image:
    with Image.open(GOLDEN / "photos" / name) as image:
        return image.convert("RGB")


def _page(lines: list[str], size=(620, 877)) -> Image.Image:
    """A page of 75 dots per inch with lines of text."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((40, 30, size[0] - 40, 90), fill=(40, 60, 120))
    for i, line in enumerate(lines):
        draw.text((60, 120 + 24 * i), line, fill="black", font=ImageFont.load_default(16))
    return image


RECEIPT = [f"item {i:02d}   {7 * i % 10}.{3 * i % 10}0" for i in range(1, 29)]


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


SAME = {
    "JPEG of quality 30": lambda image: _jpeg(image, 30),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "twice the size": lambda image: image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC),
    "lighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
}


@pytest.mark.parametrize("bits", [64, 256])
def test_hashes_equal_those_of_imagehash(bits):
    golden = json.loads((GOLDEN / "image_hashes.json").read_text())
    assert len(golden) == len(PHOTOS)
    for name, hashes in golden.items():
        assert "".join(f"{int(word):016x}" for word in perceptual_hash(_open(name), bits)) == hashes[str(bits)]


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("name", [*PHOTOS, "receipt"])
def test_a_changed_copy_has_a_near_hash_and_passes_the_second_look(name, change):
    image = _page(RECEIPT) if name == "receipt" else _open(name)
    changed = SAME[change](image)
    for bits, most in MAX_DISTANCE.items():
        assert distance(perceptual_hash(image, bits), perceptual_hash(changed, bits)) <= most
    look = second_look(Thumbnail.of(image), Thumbnail.of(changed))
    assert look.same, look


@pytest.mark.parametrize("changed", ["item 12   9.90", "item 12   4.67"])
def test_pages_of_one_template_with_other_words_have_near_hashes_and_are_told_apart(changed):
    first = _page(RECEIPT)
    lines = list(RECEIPT)
    assert lines[11] == "item 12   4.60"
    lines[11] = changed
    other = _page(lines)
    assert distance(perceptual_hash(first), perceptual_hash(other)) <= MAX_DISTANCE[256]
    look = second_look(Thumbnail.of(first), Thumbnail.of(other))
    assert not look.same
    assert "least alike place" in look.why


def test_other_colours_shapes_and_greys_are_told_apart():
    flat = [
        Image.new("RGB", (64, 64), colour) for colour in ((200, 60, 60), (60, 116, 200), (0, 0, 0), (255, 255, 255))
    ]
    for a in range(4):
        for b in range(4):
            assert second_look(Thumbnail.of(flat[a]), Thumbnail.of(flat[b])).same == (a == b)
    circles = [Image.new("RGB", (64, 64), "white") for _ in range(2)]
    for circle, colour in zip(circles, ("teal", "blue"), strict=True):
        ImageDraw.Draw(circle).ellipse((10, 10, 26, 26), fill=colour)
    assert "the colour of one place" in second_look(*map(Thumbnail.of, circles)).why
    page = _page(RECEIPT)
    assert "shapes" in second_look(Thumbnail.of(page), Thumbnail.of(page.resize((877, 877)))).why


def test_different_photos_are_far_apart():
    hashes = np.stack([perceptual_hash(_open(name)) for name in PHOTOS])
    for a in range(3):
        for b in range(a):
            assert distance(hashes[a], hashes[b]) > 3 * MAX_DISTANCE[256]

"""Images planned from their headers: the same arrays as when they are decoded at once."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from jvlm.data.content import Image as ImagePart
from jvlm.data.errors import ExampleError
from jvlm.data.examples import parse_example
from jvlm.data.images import image_size, open_image
from jvlm.data.unread_patches import UnreadPatches

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")


def picture(width=61, height=40, mode="RGB"):
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_late_chunk(content, kind, data):
    """A PNG with one more chunk behind its pixels."""
    file = io.BytesIO()
    PngImagePlugin.putchunk(file, kind, data)
    return content[:-12] + file.getvalue() + content[-12:]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 7, 8])
def test_the_size_from_the_header_is_that_of_the_decoded_image(kind, orientation, tmp_path):
    options = {"exif": turned(orientation)} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    content = saved(picture(), kind, **options)
    (tmp_path / "picture").write_bytes(content)
    for source in (content, str(tmp_path / "picture")):
        assert image_size(source) == open_image(source).size
    assert image_size(content) == ((40, 61) if options and orientation >= 5 else (61, 40))


def test_a_rotation_behind_the_pixels_counts():
    plain = saved(picture())
    late = with_late_chunk(plain, b"eXIf", turned(6).tobytes()[6:])
    assert (
        (image_size(plain), image_size(late)) == ((61, 40), (40, 61)) == (open_image(plain).size, open_image(late).size)
    )


def test_a_header_is_enough_for_a_jpeg():
    content = saved(picture(300, 200), "JPEG")
    assert image_size(content[: len(content) // 2]) == (300, 200)
    with pytest.raises(ExampleError, match="cannot be decoded"):
        open_image(content[: len(content) // 2])


@pytest.mark.parametrize("source", [b"", b"no image", b"\x89PNG\r\n\x1a\n", "gone.png", {"bytes": b""}, 3])
def test_what_cannot_be_opened_says_the_same_either_way(source):
    with pytest.raises(ExampleError) as at_once:
        open_image(source)
    with pytest.raises(ExampleError) as from_header:
        image_size(source)
    # the address of a buffer is in Pillow's message
    assert str(from_header.value).partition(" at 0x")[0] == str(at_once.value).partition(" at 0x")[0]


def images_of(*sizes):
    kinds = ("JPEG", "PNG", "WEBP")
    return [saved(picture(*size), kinds[n % 3]) for n, size in enumerate(sizes)]


def example_of(images):
    user = {"role": "user", "content": "<image>" * len(images) + "what is it?"}
    return {"messages": [user, {"role": "assistant", "content": "cells"}], "images": images}


def decoded(processor, patches):
    out = np.zeros(patches.shape, np.uint8)
    for piece, first in patches.pieces_from():
        if isinstance(piece, np.ndarray):
            out[first : first + len(piece)] = piece
        else:
            processor.write_patches(piece, out[first : first + piece.stop - piece.start])
    return out


@pytest.mark.parametrize("upscale", [1.0, 1.7])
def test_an_example_planned_and_then_decoded_is_the_example(tiny, upscale):
    sources = [*images_of((61, 40), (200, 31), (45, 90)), picture(50, 50)]
    parsed = parse_example(example_of(sources)).map(
        lambda part: dataclasses.replace(part, upscale=upscale) if isinstance(part, ImagePart) else part
    )
    expected, planned = tiny.processor.encode(parsed), tiny.processor.encode(parsed, decode=False)
    assert isinstance(planned.patches, UnreadPatches)
    for field in dataclasses.fields(expected):
        if field.name != "patches":
            assert np.array_equal(getattr(planned, field.name), getattr(expected, field.name)), field.name
    assert planned.patches.shape == expected.patches.shape
    assert np.array_equal(decoded(tiny.processor, planned.patches), expected.patches)
    for part in (slice(0, 8), slice(4, 40), slice(20, None), slice(0, 0)):
        assert np.array_equal(decoded(tiny.processor, planned.patches[part]), expected.patches[part])


def test_an_image_of_another_size_than_its_header_said_is_refused(tiny, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(saved(picture(61, 40)))
    planned = tiny.processor.encode(example_of([str(path)]), decode=False)
    path.write_bytes(saved(picture(40, 61)))
    with pytest.raises(ExampleError, match="40 x 61 pixels, where its header said 61 x 40"):
        decoded(tiny.processor, planned.patches)

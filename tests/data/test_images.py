"""Pictures come in as anything a row holds; what is no picture is one clear error."""

import base64
import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from jvlm.data.errors import Origin, RowError
from jvlm.data.images import open_image
from tests.support import picture

PICTURE = picture(60, 40)


def encoded(kind="PNG", image=PICTURE, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def stored(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    return tmp_path


SOURCES = {
    "PIL image": lambda folder: PICTURE,
    "array": lambda folder: np.asarray(PICTURE),
    "bytes": lambda folder: encoded(),
    "bytearray": lambda folder: bytearray(encoded()),
    "absolute path": lambda folder: str(folder / "a.png"),
    "Path": lambda folder: folder / "a.png",
    "relative path": lambda folder: "a.png",
    "file URI": lambda folder: f"file://{folder / 'a.png'}",
    "data URI": lambda folder: "data:image/png;base64," + base64.b64encode(encoded()).decode(),
    "dict of bytes": lambda folder: {"bytes": encoded(), "path": None},
    "dict of a path": lambda folder: {"bytes": None, "path": "a.png"},
    "OpenAI's dict": lambda folder: {"url": "data:image/png;base64," + base64.b64encode(encoded()).decode()},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_same_picture_comes_from_every_kind_of_source(stored, kind):
    image = open_image(SOURCES[kind](stored), roots=(str(stored),))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PICTURE))


@pytest.mark.parametrize("channels", [None, 1])
def test_grey_arrays_become_rgb(channels):
    grey = np.asarray(PICTURE.convert("L"))
    image = open_image(grey if channels is None else grey[..., None])
    np.testing.assert_array_equal(np.asarray(image), np.repeat(grey[..., None], 3, -1))


def test_transparency_is_laid_on_white():
    see_through = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert open_image(see_through).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    turned = open_image(encoded("JPEG", exif=exif))
    assert turned.size == (40, 60)


REFUSED = {
    "not an image": (b"not a picture at all", "cannot be decoded"),
    "no bytes": (b"", "cannot be decoded"),
    "half a PNG": (encoded()[: len(encoded()) // 2], "cannot be decoded"),
    "half a JPEG": (encoded("JPEG")[:400], "cannot be decoded"),
    "bad base64": ("data:image/png;base64,@@@@", "cannot be decoded"),
    "float array": (np.zeros((4, 4, 3)), r"array of float64 \(4, 4, 3\), expected uint8"),
    "array of five channels": (np.zeros((4, 4, 5), np.uint8), r"array of uint8 \(4, 4, 5\)"),
    "number": (5, "a int is not a picture"),
    "nothing": (None, "a NoneType is not a picture"),
    "empty dict": ({}, "a NoneType is not a picture"),
    "URL": ("https://example.com/a.png", "is a URL.*download it first"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_picture_is_refused_with_row_and_field(kind):
    source, says = REFUSED[kind]
    with pytest.raises(RowError, match=f"rows.jsonl, row 7, field 'images\\[2\\]': .*{says}"):
        open_image(source, origin=Origin("rows.jsonl", 7), field="images[2]")


def test_a_missing_file_names_every_place_tried(tmp_path):
    with pytest.raises(RowError) as caught:
        open_image("sub/a.png", origin=Origin("rows.jsonl", 7), roots=(str(tmp_path / "x"), str(tmp_path / "y")))
    for place in (tmp_path / "x" / "sub/a.png", tmp_path / "y" / "sub/a.png"):
        assert str(place) in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_damaged_files_give_a_picture_or_a_row_error_and_nothing_else(kind):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    original = encoded(kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    for _ in range(1000):
        damaged = bytearray(original[: rng.integers(1, len(original) + 1)])
        for place in rng.integers(0, min(len(damaged), 400), rng.integers(0, 6)):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(RowError):
            assert open_image(bytes(damaged)).mode == "RGB"

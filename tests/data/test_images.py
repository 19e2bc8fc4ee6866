"""Pictures come in as anything an example holds; what is no picture is one clear error."""

import base64
import contextlib
import io
import struct
import zlib
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes, unicode_string_dtypes
from PIL import Image

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.images import image_size, open_image
from tests.support import picture

PICTURE = picture(60, 40)


def encoded(kind="PNG", image=PICTURE, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def stored(tmp_path):
    for name in ("a.png", "a b%ü.png", "c%20d.png"):
        (tmp_path / name).write_bytes(encoded())
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
    "escaped file URI": lambda folder: (folder / "a b%ü.png").as_uri(),
    "file URI that is not escaped": lambda folder: f"file://{folder / 'a b%ü.png'}",
    "file URI of this machine": lambda folder: f"file://localhost{folder / 'a.png'}",
    "relative file URI": lambda folder: "file://a%20b%25%C3%BC.png",
    "file URI of a name with an escape in it": lambda folder: f"file://{folder / 'c%20d.png'}",
    "escaped dict": lambda folder: {"url": (folder / "a b%ü.png").as_uri()},
    "a name with an escape in it": lambda folder: "c%20d.png",
    "base64": lambda folder: base64.b64encode(encoded()).decode(),
    "base64 in lines": lambda folder: base64.encodebytes(encoded()).decode(),
    "base64 without padding": lambda folder: base64.b64encode(encoded()).decode().rstrip("="),
    "base64 for URLs": lambda folder: base64.urlsafe_b64encode(encoded()).decode(),
    "base64 in a dict": lambda folder: {"bytes": base64.b64encode(encoded()).decode(), "path": None},
    "data URI in lines": lambda folder: "data:image/png;base64," + base64.encodebytes(encoded()).decode(),
    "data URI with parameters": lambda folder: (
        "DATA:image/png;charset=utf-8;base64," + base64.b64encode(encoded()).decode()
    ),
    "escaped data URI": lambda folder: "data:image/png;base64," + quote(base64.b64encode(encoded()).decode(), safe=""),
    "data URI of escaped bytes": lambda folder: "data:image/png," + quote(encoded()),
    "empty bytes beside a path": lambda folder: {"bytes": b"", "path": "a.png"},
    "OpenAI's dict": lambda folder: {"url": "data:image/png;base64," + base64.b64encode(encoded()).decode()},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_same_picture_comes_from_every_kind_of_source(stored, kind):
    image = open_image(SOURCES[kind](stored), roots=(str(stored),))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PICTURE))


GREY = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
LIGHT = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.asarray(PICTURE)


def reloaded(image, kind, **options):
    return encoded(kind, image, **options)


def tiff(content, width, height, bits):
    """A grey TIFF of unsigned whole numbers, which Pillow does not write itself."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: height}
    tags[279] = len(content)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + content


def packed_in_12_bits(values):
    first, second = values.reshape(-1, 2).astype(np.uint32).T
    three = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
    return three.astype(np.uint8).tobytes()


# source -> what it shows, as float: everything is rounded from there
SCALED = {
    "16-bit PIL image": (Image.fromarray(GREY), GREY / 257),
    "16-bit PNG": (reloaded(Image.fromarray(GREY), "PNG"), GREY / 257),
    "16-bit PNG, only dark": (reloaded(Image.fromarray(GREY // 257), "PNG"), (GREY // 257) / 257),
    "16-bit TIFF": (reloaded(Image.fromarray(GREY), "TIFF"), GREY / 257),
    "16-bit TIFF, most significant byte first": (
        Image.frombytes("I;16B", (64, 48), GREY.byteswap().tobytes()),
        GREY / 257,
    ),
    "16-bit TIFF where 0 is white": (
        reloaded(Image.fromarray(GREY), "TIFF", tiffinfo={262: 0}),
        255 - GREY / 257,
    ),
    "16-bit JPEG 2000": (reloaded(Image.fromarray(GREY), "JPEG2000"), GREY / 257),
    "16-bit PGM": (b"P5 64 48 65535\n" + GREY.astype(">u2").tobytes(), GREY / 257),
    "16-bit PGM, only dark": (b"P5 64 48 65535\n" + (GREY // 257).astype(">u2").tobytes(), (GREY // 257) / 257),
    "10-bit PGM": (b"P5 64 48 1023\n" + (GREY // 64).astype(">u2").tobytes(), (GREY // 64) / 1023 * 255),
    "32-bit TIFF of 16-bit values": (reloaded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), GREY / 257),
    "unsigned 32-bit TIFF of 16-bit values": (tiff(GREY.astype("<u4").tobytes(), 64, 48, 32), GREY / 257),
    "12-bit TIFF": (tiff(packed_in_12_bits(GREY >> 4), 64, 48, 12), (GREY >> 4) / 4095 * 255),
    "32-bit TIFF of 8-bit values": (reloaded(Image.fromarray(LIGHT.astype(np.int32)), "TIFF"), LIGHT),
    "mode I of an 8-bit picture": (Image.fromarray(LIGHT).convert("I"), LIGHT),
    "float TIFF of 0..1": (reloaded(Image.fromarray((GREY / 65535).astype(np.float32)), "TIFF"), GREY / 257),
    "float TIFF of 0..255": (reloaded(Image.fromarray(LIGHT.astype(np.float32)), "TIFF"), LIGHT),
    "mode F of an 8-bit picture": (Image.fromarray(LIGHT).convert("F"), LIGHT),
    "1 bit": (Image.fromarray(LIGHT > 99), (LIGHT > 99) * 255),
    "bool array": (LIGHT > 99, (LIGHT > 99) * 255),
    "uint16 array": (GREY, GREY / 257),
    "uint16 array, other byte order": (GREY.astype(">u2"), GREY / 257),
    "uint16 array, colours": (COLOURS.astype(np.uint16) * 257, COLOURS),
    "int64 array of 8-bit values": (COLOURS.astype(np.int64), COLOURS),
    "uint32 array of 16-bit values": (GREY.astype(np.uint32), GREY / 257),
    "int8 array": (LIGHT.astype(np.int8) & 127, LIGHT & 127),
    "float64 array of 0..1": (COLOURS / 255, COLOURS),
    "float32 array of 0..1": ((COLOURS / 255).astype(np.float32), COLOURS),
    "float16 array of 0..1": (
        (COLOURS / 255).astype(np.float16),
        (COLOURS / 255).astype(np.float16).astype(np.float64) * 255,
    ),
    "float16 array of 0..255": (COLOURS.astype(np.float16), COLOURS),
    "float array of 0..255 with fractions": (LIGHT * 0.99, LIGHT * 0.99),
    "channels first": (np.moveaxis(COLOURS, -1, 0), COLOURS),
    "float, channels first": (np.moveaxis(COLOURS / 255, -1, 0), COLOURS),
    "one channel first": (LIGHT[None], LIGHT),
    "one channel last": (LIGHT[..., None], LIGHT),
    "grey": (LIGHT, LIGHT),
    "not contiguous": (COLOURS[::-1, ::2], COLOURS[::-1, ::2]),
    "three rows and three columns": (COLOURS[:3, :3], COLOURS[:3, :3]),
}


@pytest.mark.parametrize("kind", SCALED)
def test_values_of_any_depth_keep_their_brightness(kind):
    source, shows = SCALED[kind]
    expected = np.rint(np.asarray(shows, np.float64))
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, -1)
    np.testing.assert_array_equal(np.asarray(open_image(source)), expected)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(arrays(scalar_dtypes() | unicode_string_dtypes(), array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
def test_any_array_is_a_picture_or_an_example_error(array):
    with contextlib.suppress(ExampleError):
        image = open_image(array)
        assert image.mode == "RGB"
        assert image.width * image.height * 4 >= array.size > 0
        assert array.dtype.kind != "f" or np.isfinite(array).all()


def indexed(transparency):
    """A picture with a palette: red, green, blue in its three pixels, some of them transparent."""
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return reloaded(image, "PNG", transparency=transparency)


def indexed_with_alpha():
    image = Image.open(io.BytesIO(indexed(None)))
    image.putalpha(Image.fromarray(np.array([[255, 0, 255]], np.uint8)))
    assert image.mode == "PA"
    return image


WHITE, RED, GREEN, BLUE = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)
BLENDED = tuple(round(c * 51 / 255 + 255 * 204 / 255) for c in (10, 20, 30))
SEE_THROUGH = {
    "RGBA": (Image.new("RGBA", (1, 1), (10, 20, 30, 0)), [WHITE]),
    "RGBA in part": (Image.new("RGBA", (1, 1), (10, 20, 30, 51)), [BLENDED]),
    "RGBA array": (np.array([[[10, 20, 30, 51]]], np.uint8), [BLENDED]),
    "LA": (Image.new("LA", (1, 1), (10, 0)), [WHITE]),
    "LA array": (np.array([[[10, 0], [10, 255]]], np.uint8), [WHITE, (10,) * 3]),
    "premultiplied": (Image.new("RGBA", (1, 1), (0, 0, 0, 0)).convert("RGBa"), [WHITE]),
    "premultiplied grey": (Image.new("LA", (1, 1), (0, 0)).convert("La"), [WHITE]),
    "PA": (indexed_with_alpha(), [RED, WHITE, BLUE]),
    "palette with one colour transparent": (indexed(1), [RED, WHITE, BLUE]),
    "palette with several": (indexed(bytes([0, 255, 0])), [WHITE, GREEN, WHITE]),
    "palette without": (indexed(None), [RED, GREEN, BLUE]),
    "grey with one value transparent": (
        reloaded(Image.fromarray(np.array([[7, 8]], np.uint8)), "PNG", transparency=7),
        [WHITE, (8,) * 3],
    ),
    "16-bit grey with one value transparent": (
        reloaded(Image.fromarray(np.array([[257, 514]], np.uint16)), "PNG", transparency=257),
        [WHITE, (2,) * 3],
    ),
    "RGB with one colour transparent": (
        reloaded(Image.fromarray(np.array([[RED, BLUE]], np.uint8)), "PNG", transparency=RED),
        [WHITE, BLUE],
    ),
    "CMYK": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [RED]),
    "HSV": (Image.new("RGB", (1, 1), BLUE).convert("HSV"), [BLUE]),
}


@pytest.mark.parametrize("kind", SEE_THROUGH)
def test_every_mode_becomes_rgb_and_transparency_is_white(kind):
    source, pixels = SEE_THROUGH[kind]
    image = open_image(source)
    assert image.mode == "RGB"
    assert np.asarray(image)[0].tolist() == [list(pixel) for pixel in pixels]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(kind):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    options = {"lossless": True} if kind == "WEBP" else {}
    moving = encoded(kind, first, save_all=True, append_images=[second], **options)
    assert open_image(moving).getpixel((3, 3)) == RED


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_what_moves_is_refused_where_still_images_are_asked_for(kind):
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    moving, still = encoded(kind, first, save_all=True, append_images=[second]), encoded(kind, first)
    for read in (open_image, image_size):
        read(still, still=True)
        with pytest.raises(ExampleError, match=rf"an animation \({kind}\). List it under videos"):
            read(moving, still=True)


def test_a_decompression_bomb_is_refused():
    pixels = zlib.compress(b"")
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    for source in (bomb, base64.b64encode(bomb).decode()):
        with pytest.raises(ExampleError, match="decompression bomb"):
            open_image(source)


@pytest.mark.parametrize("values", [GREY, LIGHT])
def test_rotation_holds_for_grey_pictures_of_any_depth(values):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = open_image(reloaded(Image.fromarray(values), "PNG", exif=exif))
    eight = values if values.dtype == np.uint8 else np.rint(values / 257)
    np.testing.assert_array_equal(np.asarray(upright)[..., 0], np.rot90(eight, -1))


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
    "float array above 255": (np.full((4, 4, 3), 300.5), r"array of float64 \(4, 4, 3\): pixels from 300.5 to 300.5"),
    "float array below 0": (np.linspace(-1, 1, 16).reshape(4, 4), r"pixels from -1.0 to 1.0 are not within 0 to 1"),
    "float array a little above 1": (np.array([[0.0, 1.02]]), "pixels from 0.0 to 1.02 are not within 0 to 1 or 255"),
    "float array with NaN": (np.array([[0.5, np.nan]]), "NaN or infinity"),
    "float array with infinity": (np.array([[0.5, np.inf]], np.float16), "NaN or infinity"),
    "whole numbers below 0": (np.array([[-1, 5]], np.int16), "pixels from -1 to 5"),
    "whole numbers above 16 bits": (np.array([[0, 65536]]), "pixels from 0 to 65536 are not within 0 to 255 or 65535"),
    "an array of words": (np.array([["a"]]), "no pixels"),
    "an array of objects": (np.array([[None]]), "no pixels"),
    "an array of complex numbers": (np.array([[1j]]), "no pixels"),
    "an array of one side": (np.zeros(4, np.uint8), r"array of uint8 \(4,\), expected"),
    "a batch": (np.zeros((1, 4, 4, 3), np.uint8), r"expected \[height, width, 3\]"),
    "an empty array": (np.zeros((0, 4, 3), np.uint8), "no pixels"),
    "an empty picture": (Image.new("RGB", (0, 4)), "no pixels: 0 x 4"),
    "32-bit picture": (Image.fromarray(np.array([[0, 2**31 - 1]], np.int32)), "pixels from 0 to 2147483647"),
    "float picture": (Image.fromarray(np.array([[-0.5, 1]], np.float32)), "pixels from -0.5 to 1.0"),
    "float picture with NaN": (Image.fromarray(np.array([[np.nan, 1]], np.float32)), "NaN"),
    "base64 of something else": ("data:;base64," + base64.b64encode(b"hello").decode(), "cannot be decoded"),
    "a data URI without data": ("data:image/png;base64", "cannot be decoded"),
    "half a picture in base64": (base64.b64encode(encoded()[:200]).decode(), "cannot be decoded"),
    "a name too long": ("a" * 5000, "file not found"),
    "a name with NUL": ("a\0.png", "file not found"),
    "a name with half an emoji": ("a\ud83d.png", r"file not found; tried .*a\\ud83d.png"),
    "an empty name": ("", "file not found"),
    "a bucket": ("gs://bucket/a.png", "is a URL"),
    "a URL in capitals": ("HTTPS://example.com/a.png", "is a URL"),
    "true": (True, "a bool is not an image"),
    "a dict of a number": ({"bytes": 5}, "a int is not an image"),
    "a dict of nulls": ({"bytes": None, "path": None}, "is not an image"),
    "array of five channels": (np.zeros((4, 4, 5), np.uint8), r"array of uint8 \(4, 4, 5\)"),
    "number": (5, "a int is not an image"),
    "nothing": (None, "a NoneType is not an image"),
    "empty dict": ({}, "a NoneType is not an image"),
    "URL": ("https://example.com/a.png", "is a URL.*download it first"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_picture_is_refused_with_example_and_field(kind):
    source, says = REFUSED[kind]
    with pytest.raises(ExampleError, match=f"examples.jsonl, line 7, field 'images\\[2\\]': .*{says}"):
        open_image(source, origin=Origin("examples.jsonl", 7), field="images[2]")


def test_a_missing_file_names_every_place_tried(tmp_path):
    with pytest.raises(ExampleError) as caught:
        open_image("sub/a.png", origin=Origin("examples.jsonl", 7), roots=(str(tmp_path / "x"), str(tmp_path / "y")))
    for place in (tmp_path / "x" / "sub/a.png", tmp_path / "y" / "sub/a.png"):
        assert str(place) in str(caught.value)


@pytest.mark.parametrize(
    ("named", "stored"),
    [("caf\u00e9/a.png", "cafe\u0301/a.png"), ("cafe\u0301/a.png", "caf\u00e9/a.png"), ("b\\a.png", "b/a.png")],
)
def test_files_are_found_in_the_unicode_of_another_system_and_under_windows_slashes(tmp_path, named, stored):
    (tmp_path / stored).parent.mkdir()
    (tmp_path / stored).write_bytes(encoded())
    for source in (named, f"file://{tmp_path}/{named}"):
        assert open_image(source, roots=(str(tmp_path),)).size == (60, 40)
    (tmp_path / named).parent.mkdir(exist_ok=True)
    Image.new("RGB", (3, 3)).save(tmp_path / named)  # what has the very name comes first
    assert open_image(named, roots=(str(tmp_path),)).size == (3, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_damaged_files_give_a_picture_or_an_example_error_and_nothing_else(kind):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    original = encoded(kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    for _ in range(1000):
        damaged = bytearray(original[: rng.integers(1, len(original) + 1)])
        for place in rng.integers(0, min(len(damaged), 400), rng.integers(0, 6)):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(ExampleError):
            assert open_image(bytes(damaged)).mode == "RGB"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"Exif",
        b"Exif\x00\x00",
        b"Exif\x00\x00II*\x00",
        b"Exif\x00\x00II*\x00\xff\xff\xff\xff",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x05\x00\x00\x00\x01\x00\x00\x00\x1a\x00\x00\x00\x00"
        + bytes(8),  # an orientation of 0/0
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x02\x00\x00\x00\x04\xff\xfe\xfd\x00",  # of bad text
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12",  # more tags than bytes
    ],
)
def test_odd_exif_data_costs_no_more_than_the_image(kind, block):
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, kind, exif=block)
    sizes = {(30, 20)}
    for read in (lambda source: open_image(source).size, image_size):
        with contextlib.suppress(ExampleError):
            sizes.add(read(file.getvalue()))
    assert sizes == {(30, 20)}

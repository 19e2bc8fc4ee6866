"""Images from whatever an example holds."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from jvlm.data import remote_media, stores
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.pixels import ORIENTATION, array_to_rgb, image_to_rgb
from jvlm.data.values import without_nulls
from jvlm.errors import UserError, file_errors

_REMOTE = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_HEADER_FIRST = ("JPEG", "MPO", "WEBP")  # whose size and rotation are read before any pixel
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
_PNG = b"\x89PNG\r\n\x1a\n"


def open_image(
    source: Any,
    *,
    origin: Origin = Origin(),
    field: str = "images",
    roots: tuple[str, ...] = (),
    still: bool = False,
) -> Image.Image:
    """Return an RGB image from a path, ``file://`` URL, bytes, base64 (``data:`` URI or not), a dict with one of these,
    a PIL image or an array.

    Relative paths are looked up in ``roots`` (the data file's folder first). Transparency is laid on white, as
    qwen-vl-utils does, and EXIF rotation is applied, as transformers does. Of animations it is the first frame, unless
    ``still`` refuses them. How other than 8-bit values are scaled: `jvlm.data.pixels`.

    Raises:
      ExampleError: not found (naming the paths tried), not decodable, or not an image.
    """
    source = _found(source, roots, origin, field)
    with _decoding(source, origin, field):
        if isinstance(source, np.ndarray):
            return array_to_rgb(source)
        if isinstance(source, bytes | bytearray | memoryview):
            source = io.BytesIO(source)
        if isinstance(source, Image.Image):
            return image_to_rgb(source)
        if isinstance(source, Path | io.BytesIO):
            with Image.open(source) as image:
                if still:
                    _check_still(image, origin, field)
                return image_to_rgb(image)
    raise ExampleError(
        origin, field, f"a {type(source).__name__} is not an image", "Give a path, bytes, image or array"
    )


def image_size(
    source: Any,
    *,
    origin: Origin = Origin(),
    field: str = "images",
    roots: tuple[str, ...] = (),
    still: bool = False,
) -> tuple[int, int]:
    """Return (width, height) of what `open_image` returns, from the header of the file where that says it all.

    Raises:
      ExampleError: as `open_image`, but not for pixels that cannot be decoded, where the header is enough.
    """
    source = _found(source, roots, origin, field)
    if isinstance(source, Path | bytes | bytearray | memoryview):
        with _decoding(source, origin, field):
            file = source if isinstance(source, Path) else io.BytesIO(source)
            with Image.open(file) as image:
                if still:
                    _check_still(image, origin, field)
                if 0 not in image.size and (image.format in _HEADER_FIRST or _is_plain_png(image)):
                    # that of the class itself: a PNG's own decodes it
                    turned = Image.Image.getexif(image).get(ORIENTATION, 1) in range(5, 9)
                    return image.size[::-1] if turned else image.size
    return open_image(source, origin=origin, field=field, roots=roots, still=still).size


def _check_still(image: Image.Image, origin: Origin, field: str) -> None:
    """Raise ExampleError for an animation: of it no more than the first frame would be seen."""
    if image.format in _ANIMATED and getattr(image, "is_animated", False):
        fix = "List it under videos, or set data.animated_images first_frame"
        raise ExampleError(origin, field, f"an animation ({image.format})", fix)


def _is_plain_png(image: Image.Image) -> bool:
    """Whether a file is a PNG in which nothing that matters comes behind the pixels."""
    if image.format != "PNG" or "Raw profile type exif" in image.info:
        return False
    file = image.fp
    at = file.tell()
    try:
        file.seek(len(_PNG))
        has_pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"IEND":
                return has_pixels
            if has_pixels and kind not in (b"IDAT", b"tIME"):
                return False
            has_pixels = has_pixels or kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(at)


def _found(source: Any, roots: tuple[str, ...], origin: Origin, field: str) -> Any:
    """Return what an image is opened from: a file, bytes, a PIL image or an array."""
    source = unwrap(source)
    with _decoding(source, origin, field):
        return image_source(str(source), roots, origin, field) if isinstance(source, str | Path) else source


@contextlib.contextmanager
def _decoding(source: Any, origin: Origin, field: str) -> Iterator[None]:
    """Make whatever is raised inside an ExampleError about the image."""
    try:
        yield
    except UserError:  # ExampleErrors; and of a store or a disk that ends the run
        raise
    except Exception as error:  # Pillow lets through whatever a damaged file makes its decoders raise
        shown = f" ({str(source)[:200]})" if isinstance(source, str | Path) else ""
        kind = "array" if isinstance(source, np.ndarray) else "image"
        raise ExampleError(
            origin, field, f"the {kind}{shown} cannot be decoded ({error})", "Replace or remove the image"
        ) from error


def content_digest(
    source: Any, *, origin: Origin = Origin(), field: str = "images", roots: tuple[str, ...] = ()
) -> bytes:
    """Return the SHA-256 of an image's bytes: of its file, however it is given; of an array or PIL image its pixels.

    Raises:
      ExampleError: as `open_image`.
    """
    source = unwrap(source)
    if isinstance(source, str | Path):
        source = image_source(str(source), roots, origin, field)
    if isinstance(source, Path):
        with file_errors(source, "read"):
            source = source.read_bytes()
    if not isinstance(source, bytes | bytearray | memoryview):
        image = open_image(source, origin=origin, field=field, roots=roots)
        source = repr(image.size).encode() + image.tobytes()
    return hashlib.sha256(source).digest()


def unwrap(source: Any) -> Any:
    """Return what a dict of the forms {"bytes", "path"} and {"url"} holds, bytes first."""
    if not isinstance(source, dict):
        return source
    given = without_nulls(source)
    return next((given[key] for key in ("bytes", "path", "url") if key in given and _holds(given[key])), None)


def _holds(value: Any) -> bool:
    return not (isinstance(value, str | bytes) and not value)


def image_source(text: str, roots: tuple[str, ...], origin: Origin, field: str) -> Path | bytes:
    """Return the file or the bytes that a string stands for: a path, a URL of a file, a ``data:`` URI, or base64 alone.

    Raises:
      ExampleError: another kind of URL, base64 with an error in it, or a file that is not there.
    """
    if text[:5].lower() == "data:":
        head, comma, body = text.partition(",")
        encoded = head.lower().rstrip().endswith(";base64")
        content = _from_base64(urllib.parse.unquote(body)) if encoded else urllib.parse.unquote_to_bytes(body)
        if not comma or content is None:
            raise ExampleError(
                origin, field, f"{text[:60]}... cannot be decoded (not base64)", "Replace or remove the image"
            )
        return content
    file = _existing(text, roots)
    if file is not None:
        return file
    content = _from_base64(text)
    if content is not None and _is_image(content):
        return content
    return find_file(text, roots, origin, field)


def _from_base64(text: str) -> bytes | None:
    """Base64 of either alphabet, with or without line ends and padding."""
    plain = "".join(text.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def _is_image(content: bytes) -> bool:
    """Whether Pillow knows the kind of file; a damaged one it may know all the same."""
    try:
        Image.open(io.BytesIO(content)).close()
    except UnidentifiedImageError:
        return False
    return True


def find_file(path: str, roots: tuple[str, ...], origin: Origin, field: str) -> Path:
    """Return the media file: absolute, or relative to one of ``roots``. Raises ExampleError naming the paths tried."""
    if _REMOTE.match(path):
        fix = "jvlm reads no network at run time: download it first"
        if stores.is_known(path):
            fix = "Name it relative to the data file, or to data.media_root, which may be a folder of the bucket"
        raise ExampleError(origin, field, f"{path[:200]} is a URL", fix)
    file = _existing(path, roots)
    if file is not None:
        return file
    candidates = _candidates(path, roots)
    tried = list(dict.fromkeys(str(stores.remote_of(place) or place)[:200] for place in candidates))
    raise ExampleError(
        origin, field, f"file not found; tried {', '.join(tried)}", "Correct the path or set data.media_root"
    )


def check_within(source: Any, folders: tuple[str, ...], *, origin: Origin, field: str, roots: tuple[str, ...]) -> None:
    """Raise ExampleError for an image or video in a file outside these folders, links resolved."""
    source = unwrap(source)
    file = _existing(str(source), roots) if isinstance(source, str | Path) else None
    if file is None:
        return
    real = file.resolve()
    if not any(real.is_relative_to(remote_media.root_of(folder).resolve()) for folder in folders):
        allowed = ", ".join(folders)
        raise ExampleError(
            origin,
            field,
            f"{real} is outside {allowed}",
            "Move the file there, or add its folder to data.media_folders",
        )


def _existing(path: str, roots: tuple[str, ...]) -> Path | None:
    return next((file for file in _candidates(path, roots) if remote_media.fetched(file) or _is_file(file)), None)


def _candidates(path: str, roots: tuple[str, ...]) -> Iterator[Path]:
    """Yield places to look at. The path of a URL is unescaped, but for names that hold a % of their own.

    After the name as it is come its other forms in Unicode, since macOS writes letters and their accents apart, and
    those with slashes in the place of Windows' backslashes.
    """
    names = [path]
    if path[:7].lower() == "file://":
        plain = path[7:].removeprefix("localhost")
        names = [urllib.parse.unquote(plain), plain]
    if not path.isascii():
        names += [unicodedata.normalize(form, name) for name in tuple(names) for form in ("NFC", "NFD")]
    if "\\" in path:
        names += [name.replace("\\", "/") for name in tuple(names)]
    for name in map(Path, dict.fromkeys(names)):
        if name.is_absolute():
            yield name
        else:
            yield from (Path(remote_media.root_of(root), name) for root in (*roots, "."))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or in a folder that may not be read
        return False

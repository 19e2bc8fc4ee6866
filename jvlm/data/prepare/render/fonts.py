"""Fonts that have every character that is drawn with them."""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageFont

from jvlm.data.errors import ExampleError, Origin
from jvlm.errors import UserError, file_errors


class Fonts:
    """Font files, checked: each opens, and says which characters it has.

    Args:
      patterns: files or globs of TrueType and OpenType fonts; none for the text fonts that come with matplotlib.

    Raises:
      UserError: a pattern that matches nothing, a file that is no font, or fontTools is not installed.
    """

    def __init__(self, patterns: Sequence[str] = ()):
        self.files = [file for pattern in patterns for file in _matching(pattern)] or _shipped()
        self._characters = {file: _characters(file) for file in self.files}
        self.monospaced = [file for file in self.files if _is_monospaced(file)]

    def draw_from(self, rng: np.random.Generator, text: str, origin: Origin, *, monospaced: bool = False) -> str:
        """Return one of the fonts that have all characters of a text. Raises ExampleError if there is none."""
        files = self.monospaced if monospaced else self.files
        wanted = {ord(c) for c in text if not c.isspace()}
        able = [file for file in files if wanted <= self._characters[file]]
        if able:
            return able[int(rng.integers(len(able)))]
        lacking = min((wanted - self._characters[file] for file in files), key=len, default=wanted)
        shown = " ".join(f"U+{code:04X}" for code in sorted(lacking)[:8])
        kind = "monospaced font" if monospaced else "font"
        raise ExampleError(origin, "text", f"no {kind} has {shown}", "Give a font that does: --fonts FILE")

    def identity(self) -> str:
        """Return what tells these fonts from others."""
        value = hashlib.sha256()
        for path in self.files:
            value.update(Path(path).read_bytes())
        return value.hexdigest()


@functools.lru_cache(maxsize=64)
def font(file: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a font of a size in pixels, laid out the same on every machine."""
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def _matching(pattern: str) -> list[str]:
    found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UserError(f"no font matches {pattern!r}")
    return found


def required(name: str) -> Any:
    """Return a module of the extra ``prepare``. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"rendering needs {name.partition('.')[0]}: pip install 'jvlm[prepare]'") from error


def _shipped() -> list[str]:
    folder = Path(required("matplotlib").get_data_path()) / "fonts" / "ttf"
    names = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono")
    return [str(folder / f"{name}.ttf") for name in names]


def _open(file: str) -> Any:
    library = required("fontTools.ttLib")
    try:
        with file_errors(file, "read"):
            return library.TTFont(file, lazy=True)
    except library.TTLibError as error:
        raise UserError(f"{file}: not a font ({error})") from error


def _characters(file: str) -> frozenset[int]:
    with _open(file) as opened:
        return frozenset(opened.getBestCmap() or ())


def _is_monospaced(file: str) -> bool:
    with _open(file) as opened:
        return bool(opened["post"].isFixedPitch)

"""Rendered examples by their number: each depends on the seed, its number and the inputs alone."""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import Read
from jvlm.data.prepare.regions import Scene, Task, record
from jvlm.data.prepare.render import drawing
from jvlm.data.prepare.render.degrading import degraded
from jvlm.data.prepare.render.fonts import Fonts, required
from jvlm.data.prepare.render.page import Browser
from jvlm.errors import UserError, file_errors

Kind = Literal["text", "columns", "formula", "code", "table", "page"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True)
class Rendering:
    """What is drawn.

    Attributes:
      kind: "text" draws paragraphs of text files, parted by empty lines; "columns" pages of two or three columns of
        them; "formula" lines of files, as LaTeX; "code" parts of files of code; "table" parts of CSV files, whose first
        row is the head; "page" HTML files.
      count: examples; inputs come in turn, each time drawn otherwise.
      seed, task: as of `jvlm.data.prepare.regions.record`.
      degrade: share of the examples that are turned, blurred, noisy or compressed (`degrading.degraded`).
      fonts: files or globs; none for DejaVu's.
      browser: Chromium's file; None looks for one on the path.
    """

    kind: Kind
    count: int
    seed: int = 0
    task: Task = "read"
    degrade: float = 0.0
    fonts: tuple[str, ...] = ()
    browser: str | None = None

    def __post_init__(self):
        if self.count < 1:
            raise UserError(f"count is {self.count}; it must be at least 1")
        if not 0 <= self.degrade <= 1:
            raise UserError(f"degrade is {self.degrade}; it is a share of the examples, from 0 to 1")


class RenderedExamples:
    """Examples as `jvlm.data.conversion.write_shards` reads them. Use it as a context manager.

    Raises:
      UserError: a pattern that matches nothing, a file without inputs, fonts or a browser that cannot be used.
    """

    def __init__(self, patterns: Sequence[str], settings: Rendering):
        self.settings = settings
        self.files = [Path(file) for pattern in patterns for file in _matching(pattern)]
        self._inputs = [one for file in self.files for one in _inputs(file, settings.kind)]
        drawn = settings.kind in ("text", "columns", "code", "table")
        self._fonts = Fonts(settings.fonts) if drawn else None
        self._opened: Browser | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def _browser(self) -> Browser:
        if self._opened is None:
            self._opened = Browser(self.settings.browser)
        return self._opened

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._opened is not None:
            self._opened.close()

    def __len__(self) -> int:
        return self.settings.count

    def formats(self) -> list[str]:
        """Return how many inputs there are."""
        return [f"{len(self._inputs):,} inputs of kind {self.settings.kind} in {len(self.files):,} files"]

    def read(self, index: int) -> Read:
        """Return an example, or the error of one that cannot be drawn."""
        file, number, content = self._inputs[index % len(self._inputs)]
        origin = Origin(str(file), number)
        rng = np.random.default_rng((self.settings.seed, index))
        try:
            scene = self._scene(file, content, rng, origin)
            if rng.random() < self.settings.degrade:
                scene = degraded(scene, rng)
            return Read(origin, record(scene, self.settings.task, rng, origin) | {"rendered": self.settings.kind})
        except ExampleError as error:
            return Read(origin, error)

    def _scene(self, file: Path, content, rng: np.random.Generator, origin: Origin) -> Scene:
        match self.settings.kind:
            case "text":
                return drawing.text_scene(content, self._fonts, rng, origin)
            case "columns":
                return drawing.columns_scene(content, self._fonts, rng, origin)
            case "formula":
                return drawing.formula_scene(content, rng, origin)
            case "code":
                return drawing.code_scene(content, file.name, self._fonts, rng, origin)
            case "table":
                return drawing.table_scene(content, self._fonts, rng, origin)
            case "page":
                return self._browser.scene(file, rng, origin)

    def identity(self) -> str:
        """Return what tells these examples from others: inputs, settings, fonts and the versions that draw."""
        value = hashlib.sha256(repr(self.settings).encode())
        for file in self.files:
            value.update(file.read_bytes())
        if self._fonts is not None:
            value.update(self._fonts.identity().encode())
        if self.settings.kind == "page":
            value.update(self._browser.version.encode())
        for name in ("PIL", "matplotlib", "pygments"):
            value.update(required(name).__version__.encode())
        return value.hexdigest()


def _matching(pattern: str) -> list[str]:
    found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UserError(f"no file matches {pattern!r}")
    return found


def _inputs(file: Path, kind: Kind) -> list[tuple[Path, int, object]]:
    """(file, number from 1, content) of everything in a file that is drawn by itself."""
    if kind == "page":
        return [(file, 1, None)]
    try:
        with file_errors(file, "read"):
            text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not text in UTF-8 ({error})") from error
    if kind == "code":
        found: list[object] = [text]
    elif kind == "formula":
        found = [line for line in text.splitlines() if line.strip()]
    elif kind in ("text", "columns"):
        parts = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
        found = parts if kind == "text" else [parts]
    else:
        rows = [row for row in csv.reader(text.splitlines()) if row]
        if len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
            raise UserError(f"{file}: a table needs a head and rows of as many cells")
        found = [rows]
    if not text.strip():
        raise UserError(f"{file}: empty; leave it out")
    return [(file, number, one) for number, one in enumerate(found, 1)]

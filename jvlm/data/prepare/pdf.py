"""Pages of PDF files as images with their text and its boxes, read by pypdfium2 in processes that are killed.

A file that is damaged, or makes the reader crash, hang or fill the memory, is an error of its examples.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import glob
import hashlib
import importlib
import io
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self

import numpy as np

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import Read
from jvlm.data.prepare.regions import Region, Scene, Task, record
from jvlm.data.prepare.render.degrading import degraded
from jvlm.errors import UserError, file_errors
from jvlm.killable_pool import KillablePool

Unit = Literal["line", "word"]
_TASKS = 200  # of a process, before it is replaced
_FIX = "Repair or remove the file, or leave it out: --on_bad_example skip"


@dataclasses.dataclass(frozen=True)
class PdfSettings:
    """How pages are read.

    Attributes:
      pages: ranges of page numbers from 1, as ("1-5", "8", "10-"); empty for all.
      dpi: pixels an inch; a page of 612 points is 8.5 inches wide.
      max_side: longest side of a page in pixels; larger ones are drawn smaller.
      unit: what a region is.
      task, seed: as of `jvlm.data.prepare.regions.record`.
      degrade: share of the pages that are turned, blurred, noisy or compressed.
      seconds: a page may take.
      memory_gb: a process may have.
    """

    pages: tuple[str, ...] = ()
    dpi: float = 144.0
    max_side: int = 4096
    unit: Unit = "line"
    task: Task = "read"
    seed: int = 0
    degrade: float = 0.0
    seconds: float = 30.0
    memory_gb: float = 4.0

    def __post_init__(self):
        if not 0 <= self.degrade <= 1:
            raise UserError(f"degrade is {self.degrade}; it is a share of the pages, from 0 to 1")
        for one in self.pages:
            _range(one)
        for name in ("dpi", "max_side", "seconds", "memory_gb"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")

    def chosen(self, count: int) -> list[int]:
        """Return the indices of the pages of a file with so many, each once, in order."""
        if not self.pages:
            return list(range(count))
        found = set()
        for one in self.pages:
            first, last = _range(one)
            found |= set(range(first - 1, count if last is None else min(last, count)))
        return sorted(found)


def _range(text: str) -> tuple[int, int | None]:
    first, dash, last = text.partition("-")
    if first.isdigit() and int(first) >= 1 and (not dash or not last or (last.isdigit() and int(last) >= int(first))):
        return int(first), (int(last) if last else None) if dash else int(first)
    raise UserError(f"pages {text!r}: give a number from 1, as 8, or a range, as 1-5 or 10-")


class PdfPages:
    """The chosen pages of PDF files as examples. A file that cannot be opened is one example with an error.

    Args:
      patterns: files, or globs of them.

    Raises:
      UserError: a pattern that matches nothing, or no page that is chosen; pypdfium2 or pebble is not installed.
    """

    def __init__(self, patterns: Sequence[str], settings: PdfSettings = PdfSettings()):
        self.files = [file for pattern in patterns for file in _matching(pattern)]
        self.settings = settings
        _required("pypdfium2")
        _required("pebble")
        self._pool: _Pool | None = None
        self._places: list[tuple[str, int | ExampleError]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def __enter__(self) -> Self:
        for file in self.files:
            try:
                count = self._call(_count, (file,))
                self._places += [(file, page) for page in self.settings.chosen(count)]
            except UserError as error:
                self._places.append((file, ExampleError(Origin(file, 1), "pdf", f"cannot be opened: {error}", _FIX)))
        if not self._places:
            self._pool.close()
            raise UserError("none of the files has a page that --pages names")
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def _call(self, task: Any, arguments: tuple) -> Any:
        if self._pool is None:
            self._pool = _Pool(_required("pebble"), 1, _TASKS, _limit, (self.settings.memory_gb,))
        return self._pool.call(task, arguments, self.settings.seconds)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> Read:
        """Return a page, or its error."""
        file, page = self._places[index]
        if isinstance(page, ExampleError):
            return Read(page.origin, page)
        origin = Origin(file, page + 1)
        settings = self.settings
        try:
            task = (file, page, settings.dpi, settings.max_side, settings.unit)
            scene = self._call(page_scene, task)
            drawn = np.random.default_rng((settings.seed, index))
            if drawn.random() < settings.degrade:
                scene = degraded(scene, drawn)
            example = record(scene, settings.task, drawn, origin)
        except ExampleError as error:
            return Read(origin, error)
        except UserError as error:
            return Read(origin, ExampleError(origin, "pdf", f"cannot be read: {error}", _FIX))
        return Read(origin, example | {"file": Path(file).name, "page": page + 1})

    def formats(self) -> list[str]:
        """Return how many pages of how many files there are."""
        return [f"{len(self._places):,} pages of {len(self.files):,} files"]

    def identity(self) -> str:
        """Return what tells these pages from others."""
        value = hashlib.sha256(repr(self.settings).encode())
        for path in self.files:
            with file_errors(path, "read"), open(path, "rb") as file:
                value.update(hashlib.file_digest(file, "sha256").digest())
        return value.hexdigest()


class _Pool(KillablePool):
    def call(self, task: Any, arguments: tuple, seconds: float) -> Any:
        """Return the result of a task in a process. Raises UserError where it does not come to an end."""
        try:
            return self._pool.schedule(task, args=arguments, timeout=seconds).result()
        except concurrent.futures.TimeoutError as error:
            raise UserError(f"it took longer than {seconds:g} s") from error
        except self._expired as error:
            raise UserError(f"the reader crashed ({error})") from error
        except MemoryError as error:
            raise UserError("it needs more memory than memory_gb") from error


def _limit(memory_gb: float) -> None:
    size = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _matching(pattern: str) -> list[str]:
    found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UserError(f"no file matches {pattern!r}")
    return found


def _required(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"PDF files need {name}: pip install 'jvlm[prepare]'") from error


def _count(path: str) -> int:
    pdfium = _required("pypdfium2")
    try:
        with pdfium.PdfDocument(path) as document:
            return len(document)
    except pdfium.PdfiumError as error:
        raise UserError(str(error)) from error


def page_scene(path: str, number: int, dpi: float, max_side: int, unit: Unit) -> Scene:
    """Return a page of a PDF file, from 0. Raises UserError for one that cannot be read."""
    pdfium = _required("pypdfium2")
    try:
        with pdfium.PdfDocument(path) as document:
            page = document[number]
            scale = min(dpi / 72, max_side / max(page.get_size()))
            image = page.render(scale=scale).to_pil().convert("RGB")
            characters = list(_characters(page, image.size))
    except pdfium.PdfiumError as error:
        raise UserError(str(error)) from error
    file = io.BytesIO()
    image.save(file, "PNG")
    lines = _split(characters, "\n")
    text = "\n".join("".join(c for c, _ in line).strip() for line in lines if line)
    units = lines if unit == "line" else [word for line in lines for word in _split(line, " ")]
    regions = tuple(region for one in units if (region := _region(one, unit)) is not None)
    return Scene(file.getvalue(), image.size, text, regions)


Character = tuple[str, tuple[float, float, float, float] | None]


def _characters(page: Any, size: tuple[int, int]) -> Iterator[Character]:
    """Characters of a page in the order of its text, with boxes in pixels; spaces and line ends may have none."""
    raw = _required("pypdfium2.raw")
    text = page.get_textpage()
    for index in range(text.count_chars()):
        code = raw.FPDFText_GetUnicode(text.raw, index)
        character = chr(code) if code not in (0, 0xFFFE, 2) else "-" if code else ""
        if character == "\r" or not character:
            continue
        if character.isspace():
            yield "\n" if character == "\n" else " ", None
            continue
        left, bottom, right, top = text.get_charbox(index)
        (x1, y1), (x2, y2) = (_pixel(raw, page, size, x, y) for x, y in ((left, top), (right, bottom)))
        yield character, (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


_FINE = 16  # PDFium gives whole pixels: of a device so many times finer


def _pixel(raw: ModuleType, page: Any, size: tuple[int, int], x: float, y: float) -> tuple[float, float]:
    """Return a point of the page, whose rotation and crop PDFium knows, in pixels of its image."""
    found = ctypes.c_int(), ctypes.c_int()
    raw.FPDF_PageToDevice(page.raw, 0, 0, size[0] * _FINE, size[1] * _FINE, 0, x, y, *map(ctypes.byref, found))
    return found[0].value / _FINE, found[1].value / _FINE


def _split(characters: Sequence[Character], at: str) -> list[list[Character]]:
    parts: list[list[Character]] = [[]]
    for one in characters:
        if one[0] == at:
            parts.append([])
        else:
            parts[-1].append(one)
    return [part for part in parts if part]


def _region(characters: Sequence[Character], unit: Unit) -> Region | None:
    boxes = [box for _, box in characters if box is not None]
    text = "".join(c for c, _ in characters).strip()
    if not boxes or not text:
        return None
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return Region(text, (min(x1), min(y1), max(x2), max(y2)), unit)

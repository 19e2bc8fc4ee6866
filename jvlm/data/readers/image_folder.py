"""Folders of images with their texts in ``metadata.jsonl``, ``.csv`` or ``.parquet``, as `datasets` writes them."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.readers.reader import Reader
from jvlm.data.values import is_null

_VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


class ImageFolder:
    """Rows of the metadata, in which ``file_name`` is the image. Images are read in the folder alone."""

    def __init__(self, table: Reader):
        self.path, self._table = table.path, table

    def __len__(self) -> int:
        return len(self._table)

    def number(self, index: int) -> int:
        """Return the number of a row, as the metadata's own reader counts."""
        return self._table.number(index)

    def read(self, index: int, origin: Origin) -> Any:
        row = self._table.read(index, origin)
        if not isinstance(row, dict):
            return row
        found = dict(row)
        for old, one in (("file_name", "image"), ("file_names", "images")):
            if is_null(found.get(old)) or one in found:
                continue
            value = found.pop(old)
            for name in value if isinstance(value, list) else [value]:
                problem = _problem(name)
                if problem is not None:
                    return ExampleError(origin, old, f"{name!r} is {problem}", "Name a file of the folder")
            is_video = isinstance(value, str) and value.lower().endswith(_VIDEOS)
            found["video" if is_video else one] = value
        return found


def _problem(name: Any) -> str | None:
    if not isinstance(name, str) or not name:
        return "no name of a file"
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "://" in name:
        return "outside the folder"
    return None

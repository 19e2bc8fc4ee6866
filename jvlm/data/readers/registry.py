"""Which reader a file is opened with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

from jvlm.data.readers import file_kinds
from jvlm.data.readers.array_record import SHARD_SUFFIX, Shard
from jvlm.data.readers.json_array import JsonArray, is_array
from jvlm.data.readers.json_lines import JsonLines
from jvlm.data.readers.parquet import Parquet
from jvlm.data.readers.reader import Reader
from jvlm.errors import UserError


def _json(path: str) -> Reader:
    file_kinds.check_text(path)
    return JsonArray(path) if is_array(path) else JsonLines(path)


READERS: dict[str, Callable[[str], Reader]] = {
    ".jsonl": JsonLines,
    ".json": _json,
    ".parquet": Parquet,
    SHARD_SUFFIX: Shard,
}


def open_file(path: str) -> Reader:
    """Return the reader of a file, by its name and contents.

    Raises:
      UserError: a kind that is not read, a damaged file, or one without records.
    """
    reader = READERS.get(PurePath(path).suffix)
    if reader is None:
        file_kinds.check_file(path)
        raise UserError(f"{path}: examples are read from {', '.join('*' + suffix for suffix in READERS)}")
    opened = reader(path)
    if not len(opened):
        raise UserError(f"{path}: holds no examples. Write it again, or leave it out of the list")
    return opened

"""Rows from files: JSONL as users write it, and ArrayRecord shards that carry their pictures with them."""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_module

from jvlm.data import stores
from jvlm.data.errors import Origin, RowError

SHARD_SUFFIX = ".arrayrecord"
_GROUP_BYTES = 32 * 1024


class RowSource:
    """Random access to the rows of several files, as Grain's data sources want it.

    Args:
      patterns: paths or globs of ``*.jsonl`` and ``*.arrayrecord`` files; order matters, globs are sorted. Those in
        an object store are copied to this machine (`jvlm.data.stores`).

    Raises:
      FileNotFoundError: a pattern that matches nothing.
      ValueError: a file of another kind, or no rows at all.
    """

    def __init__(self, patterns: Sequence[str]):
        self.files = [path for pattern in patterns for path in matching(pattern)]
        self._readers = [_open(path) for path in self.files]
        self._starts = np.cumsum([0, *(len(r) for r in self._readers)])
        if not self._starts[-1]:
            raise ValueError(f"no rows in {', '.join(self.files) or 'an empty list of files'}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[Origin, Any]:
        """(origin, row); a line that is not JSON gives the RowError in place of the row."""
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[file])
        origin = Origin(self.files[file], row + 1)
        return origin, self._readers[file].read(row, origin)

    def __repr__(self) -> str:
        return f"RowSource({self.files})"


def matching(pattern: str) -> list[str]:
    """Files of a path or glob, sorted; of remote ones local copies. Raises FileNotFoundError if there is none."""
    if stores.is_remote(pattern):
        found = [str(path) for path in stores.matching(pattern)]
        if not found:
            raise FileNotFoundError(f"no data file matches {pattern!r}")
        return found
    found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern] * Path(pattern).is_file()
    if not found:
        raise FileNotFoundError(f"no data file matches {pattern!r} (looked in {Path.cwd()})")
    return found


def _open(path: str) -> _Jsonl | _Shard:
    if path.endswith(SHARD_SUFFIX):
        return _Shard(path)
    if path.endswith((".jsonl", ".json")):
        return _Jsonl(path)
    raise ValueError(f"{path}: rows are read from *.jsonl and *{SHARD_SUFFIX}")


class _Jsonl:
    """Keeps the place of each line; reads one when asked, so the file is never in memory."""

    def __init__(self, path: str):
        self.path = path
        places, at = [], 0
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    places.append((at, len(line)))
                at += len(line)
        self._places = np.asarray(places, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, row: int, origin: Origin) -> Any:
        start, size = self._places[row]
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(size)
        try:
            return json.loads(line)
        except ValueError as error:
            return RowError(origin, "row", f"not JSON ({error})", "Each line must be one JSON object")


class _Shard:
    """An ArrayRecord file of msgpack rows; opened by each process when it first reads."""

    def __init__(self, path: str):
        self.path = path
        self._reader = None
        self._length = self._open().num_records()

    def _open(self):
        if self._reader is None:
            self._reader = array_record_module.ArrayRecordReader(self.path, options="readahead_buffer_size:0")
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def __len__(self) -> int:
        return self._length

    def read(self, row: int, origin: Origin) -> Any:
        (record,) = self._open().read([row])
        return msgpack.unpackb(record)


def write_shard(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows, whose media must be bytes already, as one shard. Returns their number.

    Rows are compressed in groups of about 32 KiB, as the first hundred let expect, and read a group at a time: rows
    with large pictures stay alone, small ones do not pay for a header and a dictionary each.
    """
    records = map(msgpack.packb, rows)
    sample = list(itertools.islice(records, 100))
    group = max(1, _GROUP_BYTES * len(sample) // max(sum(map(len, sample)), 1))
    writer = array_record_module.ArrayRecordWriter(str(path), f"group_size:{group}")
    count = 0
    for record in itertools.chain(sample, records):
        writer.write(record)
        count += 1
    writer.close()
    return count

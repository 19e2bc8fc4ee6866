"""Files of an object store that are copied when one of their records is first read.

So a host copies what it reads, and no more. How many records a file has is known before, from its *outline*: a sparse
file of the same size, in which only those bytes are filled in that readers look at when they open a file; of a file of
up to a megabyte all are.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from jvlm.data import stores
from jvlm.data.errors import Origin
from jvlm.data.readers import file_kinds
from jvlm.data.readers.array_record import SHARD_SUFFIX
from jvlm.data.readers.reader import Reader
from jvlm.data.readers.registry import open_file
from jvlm.errors import UserError
from jvlm.units import GIB, MIB

PARQUET_SUFFIX = ".parquet"
_FREE = 2 * GIB  # of a disk, below which copies make room for further ones
_OPEN = 64  # copies that a process keeps open
_LAST = MIB  # bytes before the index of a shard: its last records, and so its mark, are there


def outlined(files: Sequence[epath.Path]) -> dict[epath.Path, Path]:
    """Return the outlines of those files whose kind allows them, on this machine; made where there are none yet."""
    known = [file for file in files if file.suffix in (SHARD_SUFFIX, PARQUET_SUFFIX)]
    with ThreadPoolExecutor(stores.CONNECTIONS) as pool:
        made = list(pool.map(_outline, known))
    new = [file for file, (_, size) in zip(known, made, strict=True) if size]
    if new:
        stores.COPIES.mkdir(parents=True, exist_ok=True)
        size, free = sum(size for _, size in made), shutil.disk_usage(stores.COPIES).free
        print(
            f"{new[0]} and {len(new) - 1} more files, {size / GIB:.2f} GiB, are copied to "
            f"{stores.COPIES.absolute()} as they are read"
            + (f"; of {free / GIB:.2f} GiB free, so copies that are not read any more make room" if size > free else "")
        )
    return {file: outline for file, (outline, _) in zip(known, made, strict=True)}


def is_outline(path: str) -> bool:
    """Whether a path is that of an outline."""
    return Path(path).is_relative_to(stores.OUTLINES)


def _outline(file: epath.Path) -> tuple[Path, int]:
    """Return (outline, bytes of the file if it was made now)."""
    target = stores.OUTLINES / stores.place_of(file).relative_to(stores.COPIES)
    stat = stores.stat_of(file, listed=True)
    if stores.is_current(target, stat):
        return target, 0
    with stores.written(target, stat) as part, open(part, "wb+") as local:
        local.truncate(stat.length)
        copy = _Ranges(file, local, stat.length)
        if stat.length <= _LAST:  # all of it in one request
            copy.range(0, stat.length)
            return target, stat.length
        copy.range(0, len(file_kinds.RIEGELI_SIGNATURE))
        if file.suffix == PARQUET_SUFFIX:
            footer = int.from_bytes(copy.range(stat.length - 8, stat.length)[:4], "little")
            copy.range(stat.length - 8 - footer, stat.length)
        else:
            copy.range(stat.length - file_kinds.BLOCK, stat.length)
            index = file_kinds.index_position(local, stat.length)
            if index is not None:
                copy.range(index - _LAST, stat.length)
    return target, stat.length


class _Ranges:
    """Copies ranges of bytes to where they are in the source."""

    def __init__(self, source: epath.Path, target: BinaryIO, size: int):
        self._source, self._target, self._size = source, target, size

    def range(self, start: int, end: int) -> bytes:
        """Copy, as far as the file goes, and return the bytes."""
        start, end = max(start, 0), min(end, self._size)
        content = stores.read_range(self._source, start, end)
        self._target.seek(start)
        self._target.write(content)
        self._target.flush()
        return content


class CopiedReader:
    """The reader of a remote file, which is copied to this machine when a record is first read.

    Where a disk has little room, copies of ``others`` that were read longest ago are removed for it.

    Args:
      original: the file in its store.
      outline: of it.
      others: the files of the same data; shared by their readers.

    Attributes:
      outlined: the reader of the outline, which reads no records.
      mark: which set of shards the file is of, if it says so.
      state: size and time of the file as it was listed.

    Raises:
      UserError: a damaged file, or one without records.
    """

    def __init__(self, original: epath.Path, outline: str, others: list[str]):
        self.path, self.original, self._others = outline, str(original), others
        self.outlined: Reader = open_file(self.path)
        self.state = _state(os.stat(outline))  # the file's own, as it was listed
        self._length = len(self.outlined)
        self.mark = getattr(self.outlined, "mark", None)
        others.append(self.original)

    def __len__(self) -> int:
        return self._length

    @property
    def block_starts(self) -> np.ndarray:
        """First record of each block; a shard is one."""
        return getattr(self.outlined, "block_starts", np.zeros(1, np.int64))

    def number(self, index: int) -> int:
        """Return the number of a record, from 1."""
        return self.outlined.number(index)

    def read(self, index: int, origin: Origin) -> Any:
        """Return a record, or the ExampleError of one that cannot be read; the file is copied first if it has to be."""
        return _OPENED.reader(self).read(index, origin)

    def copied(self) -> Reader:
        """Copy the file if it is not here, and return the reader of the copy.

        Raises:
          UserError: the file has changed since it was listed, or the disk has no room for it.
        """
        original, target = epath.Path(self.original), stores.place_of(self.original)
        target.parent.mkdir(parents=True, exist_ok=True)
        # threads and processes of a machine that want the same file wait for the first of them
        with open(f"{self.path}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file() or _state(target.stat()) != self.state:
                self._make_room(self.state[0])
                stores.fetch_one(original, target)
            copy = target.stat()
            if _state(copy) != self.state:
                raise UserError(f"{self.original} has changed since this run began. Put it back, or begin another run")
            os.utime(target, (time.time(), copy.st_mtime))  # read now, which many disks do not note by themselves
            reader = open_file(str(target))
        if len(reader) != self._length:
            raise UserError(f"{self.original}: {len(reader)} records, but {self._length} by its index. Write it again")
        return reader

    def _make_room(self, size: int) -> None:
        folder = stores.COPIES
        folder.mkdir(parents=True, exist_ok=True)
        copies = None
        while (disk := shutil.disk_usage(folder)).free < size + _FREE:
            if copies is None:
                _say_once(f"copies under {folder.absolute()} that were read longest ago make room for others")
                here = [path for path in map(stores.place_of, self._others) if path.is_file()]
                copies = iter(sorted(here, key=lambda path: path.stat().st_atime))
            oldest = next(copies, None)
            if oldest is None:
                break
            oldest.unlink(missing_ok=True)
        if disk.free < size:
            raise UserError(
                f"{self.original} is {size / GIB:.2f} GiB, but {folder.absolute()} has {disk.free / GIB:.2f} GiB free, "
                "and no copies to remove; make room, or start where there is more"
            )


@functools.cache
def _say_once(line: str) -> None:
    print(line, flush=True)


def _state(stat: os.stat_result) -> tuple[int, int]:
    """(size, time in seconds), which a copy has from its source."""
    return stat.st_size, int(stat.st_mtime)


class _Opened:
    """The copies that a process has open: the latest ones."""

    def __init__(self):
        self._readers: OrderedDict[tuple[Any, ...], Reader] = OrderedDict()
        self._lock = threading.Lock()

    def reader(self, file: CopiedReader) -> Reader:
        """Return the reader of a file's copy."""
        key = os.path.abspath(file.path), file.state
        with self._lock:
            if key in self._readers:
                self._readers.move_to_end(key)
                return self._readers[key]
        reader = file.copied()  # outside of the lock: others read meanwhile
        with self._lock:
            self._readers[key] = reader
            while len(self._readers) > _OPEN:
                self._readers.popitem(last=False)
        return reader


_OPENED = _Opened()

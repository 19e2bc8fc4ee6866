"""Parquet files, as datasets on the Hub are: images as structs of bytes and path."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.readers import file_kinds
from jvlm.data.readers.reader import missing_package
from jvlm.errors import UserError
from jvlm.units import GIB, MIB

_GROUPS = 3  # row groups kept, the latest ones
_KEPT_BYTES = 512 * MIB  # of them together, but for the latest
_MOST_BYTES = 4 * GIB  # of one row group, decompressed
_LARGE_BYTES = 256 * MIB


class Parquet:
    """Rows of a Parquet file. A row is read with its whole row group, of which the last ones stay in memory.

    Attributes:
      columns: their names.

    Raises:
      UserError: pyarrow is not installed; a file that is damaged, or of which one row group is too large to be read.
    """

    def __init__(self, path: str):
        file_kinds.check_binary(path, "Parquet", (b"PAR1",))
        self.path = path
        self._reset()
        with table_errors(path, "Parquet"):
            metadata = self._open().metadata
        self._reset()  # closed until it is read: a process may open only so many files
        self.columns = list(metadata.schema.to_arrow_schema().names)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self._bytes = [group.total_byte_size for group in groups]
        largest = max(self._bytes, default=0)
        if largest > _MOST_BYTES:
            raise UserError(
                f"{path}: a row group of {largest / GIB:.1f} GiB, read whole for each row; up to "
                f"{_MOST_BYTES / GIB:.0f} GiB is read. Write the file again with smaller row groups"
            )

    def _reset(self) -> None:
        self._file, self._kept, self._lock = None, OrderedDict(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_file", "_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _open(self):
        if self._file is None:
            try:
                import pyarrow.parquet
            except ImportError as error:
                raise missing_package(self.path, "Parquet", "pyarrow", "data") from error
            self._file = pyarrow.parquet.ParquetFile(self.path)
        return self._file

    def note(self) -> str | None:
        """Return what there is to know about reading rows in any order."""
        largest = max(self._bytes, default=0)
        if largest <= _LARGE_BYTES:
            return None
        return (
            f"{self.path}: a row group of {largest / MIB:,.0f} MiB is read whole for each example of a shuffled epoch; "
            "shards of jvlm data convert are read faster"
        )

    @property
    def block_starts(self) -> np.ndarray:
        """First row of each row group."""
        return self._starts[:-1]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def number(self, index: int) -> int:
        """Return the number of a row, from 1."""
        return index + 1

    def read(self, index: int, origin: Origin) -> Any:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            with table_errors(self.path, "Parquet"):
                table = self._group(group)
                (row,) = table.slice(index - int(self._starts[group]), 1).to_pylist()
        except UserError as error:
            return ExampleError(origin, "example", f"its row group cannot be read ({error})", "Copy the file again")
        return row

    def _group(self, number: int):
        with self._lock:
            if number not in self._kept:
                self._kept[number] = self._open().read_row_group(number, use_threads=False)
            self._kept.move_to_end(number)
            while len(self._kept) > 1 and (
                len(self._kept) > _GROUPS or sum(self._bytes[i] for i in self._kept) > _KEPT_BYTES
            ):
                self._kept.popitem(last=False)
            return self._kept[number]


@contextlib.contextmanager
def table_errors(path: str, kind: str) -> Iterator[None]:
    """Errors of pyarrow as UserErrors that name the file."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, NotImplementedError, MemoryError) as error:
        # pyarrow's exceptions are subclasses of these
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as {kind} ({reason}). Copy or write it again") from error

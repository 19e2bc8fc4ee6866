"""Arrow files: what `datasets` saves and caches, of both forms that Arrow has."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.readers import file_kinds
from jvlm.data.readers.parquet import table_errors
from jvlm.data.readers.reader import missing_package
from jvlm.errors import UserError

_FILE = b"ARROW1"
_STREAM = b"\xff\xff\xff\xff"


class Arrow:
    """Rows of an Arrow file, which each process maps into its memory: what is read stays in the page cache only.

    Raises:
      UserError: pyarrow is not installed; a damaged file.
    """

    def __init__(self, path: str):
        file_kinds.check_binary(path, "Arrow", (_FILE, _STREAM))
        self.path = path
        self._batches, self._lock = None, threading.Lock()
        with table_errors(path, "Arrow"):
            self._starts = np.cumsum([0, *(batch.num_rows for batch in self._open())])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_batches", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._batches, self._lock = None, threading.Lock()

    def _open(self) -> list:
        with self._lock:
            if self._batches is None:
                try:
                    import pyarrow
                except ImportError as error:
                    raise missing_package(self.path, "Arrow", "pyarrow", "data") from error
                file = pyarrow.memory_map(self.path)
                is_file = file.read(len(_FILE)) == _FILE
                file.seek(0)
                reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
                self._batches = reader.read_all().to_batches()
            return self._batches

    def __len__(self) -> int:
        return int(self._starts[-1])

    def number(self, index: int) -> int:
        """Return the number of a row, from 1."""
        return index + 1

    def read(self, index: int, origin: Origin) -> Any:
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            with table_errors(self.path, "Arrow"):
                (row,) = self._open()[batch].slice(index - int(self._starts[batch]), 1).to_pylist()
        except UserError as error:
            return ExampleError(origin, "example", f"it cannot be read ({error})", "Copy the file again")
        return row

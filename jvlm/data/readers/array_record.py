"""ArrayRecord shards of msgpack examples that carry their media with them: read, and written."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgpack
from array_record.python import array_record_module

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.readers import file_kinds, shard_set
from jvlm.errors import UserError

SHARD_SUFFIX = ".arrayrecord"
_GROUP_BYTES = 32 * 1024


class RecordFile:
    """The records of an ArrayRecord file as bytes; opened by each process when it first reads.

    Raises:
      UserError: the file's index cannot be read.
    """

    def __init__(self, path: str):
        file_kinds.check_shard(path)
        self.path = path
        self._reader = None
        reader = self._open()
        self._length = reader.num_records()
        if not reader.ok():
            raise UserError(
                f"{path}: {os.path.getsize(path):,} bytes, cut short or damaged: {_why(reader)}. Copy it again, or "
                "write it again"
            )
        file_kinds.check_padding(path)
        self._close()

    def _close(self) -> None:
        """Close the file until it is read again: a process may open only so many."""
        self._reader = None

    def _open(self):
        if self._reader is None:
            self._reader = array_record_module.ArrayRecordReader(self.path, options="readahead_buffer_size:0")
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def __len__(self) -> int:
        return self._length

    def number(self, index: int) -> int:
        """Return the number of a record, from 1."""
        return index + 1

    def content(self, index: int, origin: Origin) -> bytes:
        """Return a record. Raises ExampleError if it is damaged."""
        try:
            (record,) = self._open().read([index])
        except (RuntimeError, ValueError) as error:
            raise _damaged(origin, error) from error
        return record


class Shard(RecordFile):
    """A shard that jvlm wrote, or another file of msgpack examples.

    Attributes:
      mark: which set the file is of, if it says so.
    """

    def __init__(self, path: str):
        super().__init__(path)
        # a damaged last record is an error of that example, which reading it gives
        last = self._example(len(self) - 1, Origin(path, len(self))) if len(self) else None
        self.mark = shard_set.Mark.of(last)
        if self.mark and set(last) == {shard_set.MARK}:  # the mark of a shard without examples
            self._length -= 1
        self._close()

    def read(self, index: int, origin: Origin) -> Any:
        example = self._example(index, origin)
        if index == len(self) - 1 and self.mark:
            return {key: value for key, value in example.items() if key != shard_set.MARK}
        return example

    def _example(self, index: int, origin: Origin) -> Any:
        try:
            return msgpack.unpackb(self.content(index, origin))
        except ExampleError as error:
            return error
        except (ValueError, msgpack.UnpackException) as error:
            return _damaged(origin, error)


def _damaged(origin: Origin, error: Exception) -> ExampleError:
    return ExampleError(
        origin, "example", f"a damaged record ({_short(error)})", "Copy the file again, or write its set again"
    )


def _why(reader: array_record_module.ArrayRecordReader) -> str:
    """Return what is wrong with a file whose index could not be read; reading from it says so."""
    try:
        reader.read([0])
    except (RuntimeError, ValueError, IndexError) as error:
        return _short(error)
    return "its index cannot be read"


def _short(error: Exception) -> str:
    return str(error).partition("; ")[0]


def write_shard(path: str | Path, examples: Iterable[dict[str, Any]]) -> int:
    """Write examples, whose media are bytes already, as one shard. Returns their number. Raises as `write_records`."""
    return write_records(path, map(msgpack.packb, examples))


def write_records(path: str | Path, records: Iterable[bytes]) -> int:
    """Write examples as msgpack as one shard. Returns their number.

    Examples are compressed in groups of about 32 KiB, as the first hundred let expect, and read a group at a time:
    examples with large images stay alone, small ones do not pay for a header and a dictionary each. The file appears
    under its name once it is whole.

    Raises:
      UserError: the file cannot be written, as on a full disk.
    """
    records = iter(records)
    sample = list(itertools.islice(records, 100))
    group = max(1, _GROUP_BYTES * len(sample) // max(sum(map(len, sample)), 1))
    part = Path(f"{path}.{os.getpid()}.partial")
    count = 0
    try:
        with _write_errors(path):
            writer = array_record_module.ArrayRecordWriter(str(part), f"group_size:{group}")
        for record in itertools.chain(sample, records):
            with _write_errors(path):
                writer.write(record)
            count += 1
        with _write_errors(path):
            writer.close()
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


@contextlib.contextmanager
def _write_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be written ({_short(error)})") from error

"""Examples from files: JSONL as users write it, and ArrayRecord shards that carry their images with them."""

from __future__ import annotations

import codecs
import contextlib
import functools
import glob
import itertools
import json
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_module
from etils import epath

from jvlm.data import file_kinds, shard_set, stores, take
from jvlm.data.errors import ExampleError, Origin
from jvlm.errors import UserError
from jvlm.hub import datasets
from jvlm.hub.ids import is_dataset_id

SHARD_SUFFIX = ".arrayrecord"
_GROUP_BYTES = 32 * 1024
_SHOWN = 10


class ExampleSource:
    """Random access to the examples of several files, as Grain's data sources want it.

    Args:
      patterns: paths or globs of ``*.jsonl`` and ``*.arrayrecord`` files; order matters, globs are sorted. Those in
        an object store are copied to this machine (`jvlm.data.stores`); "ORG/NAME:SUBSET:SPLIT" is a dataset on the
        Hub (`jvlm.hub.datasets`). ``PATTERN#N`` takes N of their examples (`jvlm.data.take`).

    Raises:
      UserError: a pattern that matches nothing.
      UserError: a file given twice, of another kind, damaged, or without examples; a set of shards that is incomplete
        or mixed with another. Names every such file.
    """

    def __init__(self, patterns: Sequence[str]):
        found = [pair for pattern in patterns for pair in _find(pattern)]
        if not found:
            raise UserError("no data files were given")
        self.files = [path for path, _ in found]
        problems = _problems_of_names(found)
        self._readers = []
        for path in self.files:
            try:
                self._readers.append(_open(path))
            except UserError as error:
                problems.append(str(error))
        shards = [(reader.path, len(reader), reader.mark) for reader in self._readers if isinstance(reader, _Shard)]
        problems += shard_set.problems_of_marks([shard for shard in shards if shard[2] is not None])
        if problems:
            more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise UserError("\n  ".join(problems[:_SHOWN]) + more)
        self._starts = np.cumsum([0, *(len(r) for r in self._readers)])
        self._patterns, self._chosen = list(patterns), self._choose(patterns)

    def _choose(self, patterns: Sequence[str]) -> np.ndarray | None:
        """Return the examples that the numbers of ``FILE#N`` leave, file by file; None if there are none."""
        if all(take.split_count(pattern)[1] is None for pattern in patterns):
            return None
        parts, first = [], 0
        for pattern in patterns:
            last = first + len(_find(pattern))
            available, count = int(self._starts[last] - self._starts[first]), take.split_count(pattern)[1]
            part = np.arange(available) if count is None else take.chosen(count, available)
            parts.append(part + self._starts[first])
            first = last
        return np.concatenate(parts)

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> tuple[Origin, Any]:
        """(origin, example); a line that is not JSON gives the ExampleError in place of the example."""
        index = index if self._chosen is None else int(self._chosen[index])
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        within = index - int(self._starts[file])
        origin = Origin(self.files[file], self._readers[file].number(within))
        return origin, self._readers[file].read(within, origin)

    def counts(self) -> dict[str, int]:
        """Examples of each file."""
        numbers = np.diff(self._starts)
        if self._chosen is not None:
            numbers = np.diff(np.searchsorted(self._chosen, self._starts))
        return {path: int(number) for path, number in zip(self.files, numbers, strict=True)}

    def distinct(self) -> list[int]:
        """Return the index of each example once, where ``FILE#N`` repeats some."""
        if self._chosen is None:
            return list(range(len(self)))
        return np.unique(self._chosen, return_index=True)[1].tolist()

    def __repr__(self) -> str:
        return f"ExampleSource({self.files if self._chosen is None else self._patterns})"


def matching(pattern: str) -> list[str]:
    """Files of a path or glob, sorted; of remote ones local copies. Raises UserError if there is none."""
    return [path for path, _ in _find(pattern)]


def _find(pattern: str) -> list[tuple[str, epath.Path]]:
    """(path on this machine, original) of each file that a path or glob matches, sorted."""
    pattern, _ = take.split_count(pattern)
    if is_dataset_id(pattern):
        return [(str(path), epath.Path(path)) for path in datasets.fetch(pattern)]
    if stores.is_remote(pattern):
        originals = stores.find(pattern)
        if not originals:
            raise UserError(f"no data file matches {pattern!r}")
        return [(str(path), original) for path, original in zip(stores.fetch(originals), originals, strict=True)]
    # a name may hold the characters of a glob
    paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise UserError(f"no data file matches {pattern!r} (looked in {Path.cwd()})")
    return [(path, epath.Path(path)) for path in paths]


def _problems_of_names(found: Sequence[tuple[str, epath.Path]]) -> list[str]:
    """What is wrong with the files to be read, before any is opened: one line each."""
    problems, seen, folders = [], {}, defaultdict(list)
    for path, original in found:
        real = os.path.realpath(path)
        if real in seen:
            problems.append(f"{path}: given twice, also as {seen[real]}; its examples would count double. Give it once")
            continue
        seen[real] = path
        folders[str(original.parent)].append(original)
    for originals in folders.values():
        folder = originals[0].parent
        problems += shard_set.problems_of_names(
            folder, [file.name for file in originals], [file.name for file in folder.iterdir()]
        )
    return problems


def _open(path: str) -> _Jsonl | _Shard:
    if path.endswith(SHARD_SUFFIX):
        file_kinds.check_shard(path)
        reader = _Shard(path)
    elif path.endswith((".jsonl", ".json")):
        file_kinds.check_text(path)
        reader = _Jsonl(path)
    else:
        file_kinds.check_file(path)
        raise UserError(f"{path}: examples are read from *.jsonl and *{SHARD_SUFFIX}")
    if not len(reader):
        raise UserError(f"{path}: holds no examples. Write it again, or leave it out of the list")
    return reader


class _Jsonl:
    """Holds the offset of each line; reads one when asked: the file is never in memory. Blank lines are no examples."""

    def __init__(self, path: str):
        self.path = path
        offsets, at = array("q"), 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    offsets.extend((at, len(line), number))
                at += len(line)
        self._offsets = np.asarray(offsets).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._offsets)

    def number(self, index: int) -> int:
        """The number of the example's line, as an editor counts: from 1, blank lines included."""
        return int(self._offsets[index, 2])

    def read(self, index: int, origin: Origin) -> Any:
        start, size, _ = self._offsets[index]
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(size)
        try:
            return json.loads(line.decode("utf-8-sig"), object_pairs_hook=functools.partial(_object, origin))
        except ExampleError as error:
            return error
        except RecursionError:
            return ExampleError(origin, "example", "lists or objects nested too deep", "Make the example flatter")
        except ValueError as error:
            cut = "" if line.endswith(b"\n") else "; the file ends without a newline, so it may be cut short"
            return ExampleError(origin, "example", f"not JSON ({error}){cut}", "Each line must be one JSON object")


def _object(origin: Origin, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ExampleError for a key that it has twice: nothing says which value is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ExampleError(origin, twice, "the same key twice in one object", "Keep one of them")
    return found


class _Shard:
    """An ArrayRecord file of msgpack examples; opened by each process when it first reads.

    Attributes:
      mark: which set the file is of, if it says so.

    Raises:
      UserError: the file's index cannot be read.
    """

    def __init__(self, path: str):
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
        # a damaged first record is an error of that example, which reading it gives
        first = self._record(0, Origin(path, 1)) if self._length else None
        self.mark = shard_set.Mark.of(first)

    def _open(self):
        if self._reader is None:
            self._reader = array_record_module.ArrayRecordReader(self.path, options="readahead_buffer_size:0")
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def __len__(self) -> int:
        return self._length

    def number(self, index: int) -> int:
        """The number of a record, from 1."""
        return index + 1

    def read(self, index: int, origin: Origin) -> Any:
        record = self._record(index, origin)
        return {k: v for k, v in record.items() if k != shard_set.MARK} if index == 0 and self.mark else record

    def _record(self, index: int, origin: Origin) -> Any:
        try:
            (record,) = self._open().read([index])
            return msgpack.unpackb(record)
        except (RuntimeError, ValueError, msgpack.UnpackException) as error:
            return ExampleError(
                origin, "example", f"a damaged record ({_short(error)})", "Copy the file again, or write its set again"
            )


def _why(reader: array_record_module.ArrayRecordReader) -> str:
    """What is wrong with a file whose index could not be read; reading from it says so."""
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

"""Examples from files of any kind and format, as records that `jvlm.data.examples.parse_example` takes."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jvlm.data import stores, take
from jvlm.data.config import DataConfig
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.formats.detection import Detected, detect
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.readers import copied, folder, shard_set
from jvlm.data.readers.array_record import SHARD_SUFFIX
from jvlm.data.readers.copied import CopiedReader
from jvlm.data.readers.json_lines import JsonLines
from jvlm.data.readers.parquet import Parquet
from jvlm.data.readers.reader import MediaReader
from jvlm.data.readers.registry import open_file
from jvlm.errors import UserError
from jvlm.hub import datasets
from jvlm.hub.ids import is_dataset_id

_SHOWN = 10
_SAMPLE = 100  # records of a source that its format is decided on


class Read(NamedTuple):
    """An example as it is read.

    Attributes:
      record: of the ms-swift format, or a document; the ExampleError of one that cannot be read.
      untagged: images without a tag that were put before the first user text.
    """

    origin: Origin
    record: Any
    untagged: int = 0


class Opening(NamedTuple):
    """What an `ExampleSource` is opened with."""

    patterns: tuple[str, ...]
    options: FormatOptions
    to_convert: bool

    def source(self) -> ExampleSource:
        """Return the source, its files opened here, and those of an object store fetched."""
        return ExampleSource(self.patterns, self.options, to_convert=self.to_convert)


class ExampleSource:
    """Random access to the examples of several files, as Grain's data sources want it.

    Args:
      patterns: paths or globs of data files (`jvlm.data.readers.registry`); order matters, globs are sorted. Those in
        an object store are copied to this machine, shards and Parquet as they are read (`jvlm.data.readers.copied`);
        "ORG/NAME:SUBSET:SPLIT" is a dataset on the
        Hub (`jvlm.hub.datasets`). ``PATTERN#N`` takes N of their examples (`jvlm.data.take`).
      options: the format of the records, and what is read as what. The format of each pattern is decided on its first
        100 records, when an example is first asked for.
      to_convert: whether files may be read that only `jvlm data convert` takes.

    Raises:
      UserError: a pattern that matches nothing.
      UserError: a file given twice, of another kind, damaged, or without examples; a set of shards that is incomplete
        or mixed with another. Names every such file.
    """

    def __init__(self, patterns: Sequence[str], options: FormatOptions = FormatOptions(), *, to_convert: bool = False):
        by_pattern = [_find(pattern) for pattern in patterns]
        found = [pair for pairs in by_pattern for pair in pairs]
        if not found:
            raise UserError("no data files were given")
        self.files = [path for path, _ in found]
        problems = _problems_of_names(found)
        self._readers = []
        remote: list[str] = []  # files that are copied as they are read
        for path, original in found:
            try:
                is_copied = copied.is_outline(path)
                self._readers.append(
                    CopiedReader(original, path, remote) if is_copied else open_file(path, to_convert=to_convert)
                )
            except UserError as error:
                problems.append(str(error))
        shards = [reader for reader in self._readers if getattr(reader, "mark", None) is not None]
        problems += shard_set.problems_of_marks([(reader.path, len(reader), reader.mark) for reader in shards])
        if problems:
            more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise UserError("\n  ".join(problems[:_SHOWN]) + more)
        self._starts = np.cumsum([0, *(len(r) for r in self._readers)])
        if not self._starts[-1]:
            raise UserError(f"{', '.join(self.files[:_SHOWN])}: no examples at all. Give other files of the set too")
        self._patterns, self.options, self._to_convert = list(patterns), options, to_convert
        # the files of a pattern end before these; a pattern has one format, decided when it is first needed
        self._ends = np.cumsum([len(pairs) for pairs in by_pattern])
        self._detected: dict[int, Detected] = {}
        self._chosen = self._choose(patterns)

    @classmethod
    def of(cls, config: DataConfig) -> ExampleSource:
        """Return the examples that a configuration trains on. Raises as the class does."""
        return cls(config.train, FormatOptions.of(config))

    @property
    def opening(self) -> Opening:
        """Return how the source is opened again, in another process or on another machine."""
        return Opening(tuple(self._patterns), self.options, self._to_convert)

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
        """(origin, record); one that cannot be read, or is of another format, gives the ExampleError in its place."""
        origin, record, _ = self.read(index)
        return origin, record

    def read(self, index: int) -> Read:
        """Return an example, and what was done to it."""
        index = index if self._chosen is None else int(self._chosen[index])
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        within, reader = index - int(self._starts[file]), self._readers[file]
        origin, record = self._raw(file, within)
        if isinstance(record, ExampleError):
            return Read(origin, record)
        try:
            converted, untagged = self._format_of(file).convert(record, origin)
            if isinstance(reader, MediaReader):
                converted = reader.resolve(converted, within, origin)
        except ExampleError as error:
            return Read(origin, error)
        return Read(origin, converted, untagged)

    def _raw(self, file: int, within: int) -> tuple[Origin, Any]:
        reader = self._readers[file]
        origin = Origin(self.files[file], reader.number(within))
        return origin, reader.read(within, origin)

    def _format_of(self, file: int) -> Detected:
        pattern = int(np.searchsorted(self._ends, file, side="right"))
        if pattern not in self._detected:
            self._detected[pattern] = detect(self._first(pattern), self.options)
        return self._detected[pattern]

    def _first(self, pattern: int) -> list[tuple[Origin, Any]]:
        """Return the first records of a pattern's files."""
        first = int(self._ends[pattern - 1]) if pattern else 0
        places = ((file, i) for file in range(first, int(self._ends[pattern])) for i in range(len(self._readers[file])))
        return [self._raw(file, i) for (file, i), _ in zip(places, range(_SAMPLE), strict=False)]

    def formats(self) -> list[str]:
        """Return one line for each pattern: what its records are taken for, and why; and what is slow to read."""
        firsts = [0, *map(int, self._ends[:-1])]
        lines = [f"{name}: {self._format_of(file)}" for name, file in zip(self._patterns, firsts, strict=True)]
        readers = (reader.outlined if isinstance(reader, CopiedReader) else reader for reader in self._readers)
        notes = (reader.note() for reader in readers if isinstance(reader, Parquet | JsonLines))
        return [*lines, *[note for note in notes if note is not None][:_SHOWN]]

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

    def block_starts(self) -> np.ndarray | None:
        """Return the first example of each block of the files and the number of examples; None if none has blocks.

        Blocks are what a reader reads together: its ``block_starts``, or else a whole file.
        """
        if self._chosen is not None or not any(hasattr(reader, "block_starts") for reader in self._readers):
            return None
        starts = [
            getattr(reader, "block_starts", np.zeros(1, np.int64)) + start
            for reader, start in zip(self._readers, self._starts[:-1], strict=True)
        ]
        return np.append(np.concatenate(starts), self._starts[-1])

    def file_starts(self) -> np.ndarray | None:
        """Return the first example of each file and the number of examples, where files are copied as they are read."""
        is_copied = any(isinstance(reader, CopiedReader) for reader in self._readers)
        return self._starts if is_copied and self._chosen is None else None

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
        inside = f"{pattern.rstrip('/')}/*{SHARD_SUFFIX}"
        originals = stores.find(pattern) or stores.find(inside)
        if not originals:
            raise UserError(f"no data file matches {pattern!r}, nor {inside!r}")
        paths = copied.outlined(originals)
        others = [original for original in originals if original not in paths]
        why = "all of them: only the whole of such a file says how many examples it has"
        paths |= zip(others, stores.fetch(others, why), strict=True)
        return [(str(paths[original]), original) for original in originals]
    named = folder.split_name(pattern)
    if named is not None:
        return [(path, epath.Path(path)) for path in folder.files_of(*named)]
    # a name may hold the characters of a glob
    paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise UserError(f"no data file matches {pattern!r} (looked in {Path.cwd()})")
    return [(path, epath.Path(path)) for path in paths]


def _problems_of_names(found: Sequence[tuple[str, epath.Path]]) -> list[str]:
    """Return what is wrong with the files to be read, before any is opened: one line each."""
    problems, seen, folders = [], {}, defaultdict(list)
    for path, original in found:
        real = os.path.realpath(path)
        if real in seen:
            problems.append(f"{path}: given twice, also as {seen[real]}; its examples would count double. Give it once")
            continue
        seen[real] = path
        folders[str(original.parent)].append(original)
    for originals in folders.values():
        parent = originals[0].parent
        problems += shard_set.problems_of_names(
            parent, [file.name for file in originals], [file.name for file in parent.iterdir()]
        )
    return problems

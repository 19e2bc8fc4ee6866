"""Examples of any format and kind of file, written as shards that carry their media with them."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import msgpack

from jvlm.data import stores
from jvlm.data.chosen import Chosen
from jvlm.data.embedding import embed
from jvlm.data.engines.engine import Engine, InProcess, in_order
from jvlm.data.errors import ExampleError, Origin, Rejected, grouped
from jvlm.data.example_source import ExampleSource, Read
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.readers import shard_set
from jvlm.data.readers.array_record import SHARD_SUFFIX, write_records
from jvlm.data.readers.registry import open_file
from jvlm.data.sent_shards import SentShards
from jvlm.data.video.reader import shared_reader
from jvlm.data.video.stored_frames import FrameOptions, with_frames
from jvlm.errors import UserError
from jvlm.progress import Progress

_UNFINISHED = ".unfinished"
_LOCK = "lock"
_COUNTS = ".json"
_SENT = "sent"  # bytes in the store; 0 while they are being sent


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
      read, written: examples; what is not written was rejected.
      untagged: examples with images without a tag, which now have one before the first user text.
      shards: files of the set, of which ``kept`` were whole already when an interrupted conversion went on.
      formats: a line for each of the given files or globs.
      rejected: the examples left out.
    """

    read: int
    written: int
    untagged: int
    shards: int
    kept: int
    formats: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    output: str

    def text(self) -> str:
        """For the terminal."""
        lines = [*self.formats, f"{self.read} examples read, {self.written} written, {len(self.rejected)} left out"]
        lines[-1] += f": {self.shards} shard(s) under {self.output}"
        if self.kept:
            lines.append(f"{self.kept} of the shards were whole already")
        if self.untagged:
            lines.append(f"{self.untagged} examples had images without a tag: now before the first user text")
        return "\n".join(lines)


def convert(
    files: Sequence[str],
    output: str | Path,
    examples_per_shard: int = 10_000,
    *,
    options: FormatOptions = FormatOptions(),
    media_root: str | None = None,
    on_bad_example: Literal["error", "skip"] = "error",
    on_rejected: Callable[[Rejected], None] | None = None,
    frames: FrameOptions | None = None,
    engine: Engine = InProcess(),
) -> Conversion:
    """Write examples as shards of ``examples_per_shard`` in a folder, media files read into them.

    The shards appear in the folder when all of them are whole. What an interrupted conversion has finished is kept
    under ``.unfinished``, and the same call goes on after it.

    Args:
      options: the format of the examples.
      media_root: folder for relative media paths, after the data file's own.
      on_bad_example: "skip" leaves examples out that cannot be used, or whose media cannot be read.
      on_rejected: is given each of those.
      frames: store videos as frames; None stores their files.
      engine: what writes the shards.

    Raises:
      ExampleError: an example that cannot be used, or an image that cannot be read, unless skipped.
      UserError: the folder holds shards already; none of the examples can be used.
      UserError: a wrong argument, files that cannot be read, or a folder that cannot be written.
    """
    source = ExampleSource(files, options, to_convert=True)
    return write_shards(
        Chosen(source),
        output,
        examples_per_shard,
        identity=source_identity(source),
        media_root=media_root,
        on_bad_example=on_bad_example,
        on_rejected=on_rejected,
        frames=frames,
        engine=engine,
    )


class ShardSource(Protocol):
    """Examples by their index, the same each time: read from files, chosen of others, or made.

    Where an engine of other processes writes shards, it is pickled, and opens its files there.
    """

    def __len__(self) -> int: ...

    def read(self, index: int) -> Read:
        """Return an example, or the ExampleError of one that cannot be used."""

    def formats(self) -> list[str]:
        """Return lines that say what the examples are taken for."""


def write_shards(
    source: ShardSource,
    output: str | Path,
    examples_per_shard: int = 10_000,
    *,
    identity: str,
    media_root: str | None = None,
    on_bad_example: Literal["error", "skip"] = "error",
    on_rejected: Callable[[Rejected], None] | None = None,
    frames: FrameOptions | None = None,
    verb: str = "converting",
    engine: Engine = InProcess(),
) -> Conversion:
    """Write the examples of a source as shards, as `convert` does.

    Args:
      output: a folder on this machine, or one of an object store, to which each shard is sent when it is whole.
      identity: the same for the same examples, and for no others: what an interrupted call may go on with.
      verb: for the progress bar.
      engine: what writes the shards, into a folder that is there under the same name wherever that is done.

    Raises:
      ExampleError, UserError: as `convert`.
    """
    if examples_per_shard < 1:
        raise UserError(f"examples_per_shard is {examples_per_shard}; it must be at least 1")
    sent = None
    if stores.is_remote(output):
        if not isinstance(engine, InProcess):
            raise UserError(f"{output}: one process writes to a store. Leave --engine out, or give a shared folder")
        sent = SentShards(str(output))
    place = Path(output) if sent is None else sent.place
    with _unfinished(place) as folder, Progress(total=len(source), desc=verb, unit="example") as bar:
        skip = on_bad_example == "skip"
        work = _Work(source, folder, identity, examples_per_shard, media_root, skip, frames, bar, sent)
        if sent is not None:
            sent.check(work.begun())
        for name in folder.iterdir():  # of other files or settings, or begun by a process that was killed
            if name.name != _LOCK and name.name not in work.names | {f"{n}{_COUNTS}" for n in work.names}:
                name.unlink()
        parts = []
        for part in _written(work, engine):
            work.send(len(parts))
            parts.append(part)
            for example in part.rejected if on_rejected is not None else ():
                on_rejected(example)
            bar.update(min(len(parts) * examples_per_shard, len(source)) - bar.n)  # where it is not done by itself
        rejected = [example for part in parts for example in part.rejected]
        if len(source) and not sum(part.written for part in parts):
            shutil.rmtree(folder)
            if sent is not None:
                sent.remove(work.names)
            raise UserError(f"none of the {len(source)} examples can be used:\n{grouped(rejected)}")
        if sent is None:
            for name in sorted(work.names):
                (folder / name).replace(place / name)
        shutil.rmtree(folder if sent is None else place)
    return Conversion(
        read=len(source),
        written=sum(part.written for part in parts),
        untagged=sum(part.untagged for part in parts),
        shards=work.count,
        kept=sum(part.kept for part in parts),
        formats=tuple(source.formats()),
        rejected=tuple(rejected),
        output=str(output),
    )


@dataclasses.dataclass
class _Part:
    """Counts of one shard."""

    written: int = 0
    untagged: int = 0
    rejected: list[Rejected] = dataclasses.field(default_factory=list)
    kept: bool = False


def _written(work: _Work, engine: Engine) -> Iterator[_Part]:
    """Yield the counts of each shard in order, those that are whole already and those that are written now."""
    kept = [work.kept(number) for number in range(work.count)]
    made = in_order(engine, work, [range(n, n + 1) for n, part in enumerate(kept) if part is None])
    for part in kept:
        if part is None:
            (counts,) = next(made)
            yield _Part(counts["written"], counts["untagged"], [Rejected(**one) for one in counts["rejected"]])
        else:
            yield part


class _Work:
    """Shards of a source by their number, written into a folder: a `jvlm.data.engines.engine.Task`."""

    def __init__(
        self,
        source: ShardSource,
        folder: Path,
        identity: str,
        examples_per_shard: int,
        media_root: str | None,
        skip: bool,
        frames: FrameOptions | None,
        bar: Progress | None,
        sent: SentShards | None = None,
    ):
        self.frames, self.folder, self.bar, self.sent = frames, folder, bar, sent
        self.source, self.size, self.media_root, self.skip = source, examples_per_shard, media_root, skip
        self.count = -(-len(source) // examples_per_shard)
        settings = repr((identity, examples_per_shard, media_root, skip, frames))
        self.set = hashlib.sha256(settings.encode()).hexdigest()[:16]
        self.names = {self._name(number) for number in range(self.count)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bar": None}

    def _name(self, number: int) -> str:
        return shard_set.shard_name("examples", number, self.count, SHARD_SUFFIX)

    def __call__(self, some: range) -> list[dict[str, Any]]:
        """Write shards, and return the counts of each."""
        return [self._shard(number) for number in some]

    def _shard(self, number: int) -> dict[str, Any]:
        path = self.folder / self._name(number)
        examples = range(number * self.size, min((number + 1) * self.size, len(self.source)))
        path.unlink(missing_ok=True)
        part = _Part()
        write_records(path, self._records(examples, number, part))
        counts = {
            "set": self.set,
            "written": part.written,
            "untagged": part.untagged,
            "rejected": [dataclasses.asdict(example) for example in part.rejected],
        }
        Path(f"{path}{_COUNTS}").write_text(json.dumps(counts))
        return counts

    def kept(self, number: int) -> _Part | None:
        """Return the counts of a shard that an interrupted conversion of the same examples has finished."""
        path = self.folder / self._name(number)
        counts = Path(f"{path}{_COUNTS}")
        try:
            found = json.loads(counts.read_text())
            if self.sent is not None and found["set"] == self.set and self.sent.has(path.name, found.get(_SENT)):
                return _Part(found["written"], found["untagged"], [Rejected(**e) for e in found["rejected"]], kept=True)
            reader = open_file(str(path))
        except (OSError, ValueError, UserError):  # not finished: written again
            return None
        mark = reader.mark
        expected = shard_set.Mark(self.set, number, self.count, len(reader))
        if found.get("set") != self.set or mark != expected or found["written"] != len(reader):
            return None
        rejected = [Rejected(**example) for example in found["rejected"]]
        return _Part(found["written"], found["untagged"], rejected, kept=True)

    def begun(self) -> set[str]:
        """Return the names of shards of the same examples that an interrupted conversion has begun to send."""
        found = {name: Path(f"{self.folder / name}{_COUNTS}") for name in self.names}
        return {name for name, counts in found.items() if self._is_begun(counts)}

    def _is_begun(self, counts: Path) -> bool:
        try:
            found = json.loads(counts.read_text())
        except (OSError, ValueError):  # not written, or not to its end
            return False
        return found["set"] == self.set and _SENT in found

    def send(self, number: int) -> None:
        """Send a shard that is whole on to its store, if it belongs there, and remove it here."""
        path = self.folder / self._name(number)
        if self.sent is None or not path.is_file():
            return
        file = Path(f"{path}{_COUNTS}")
        counts = json.loads(file.read_text())
        size = path.stat().st_size
        file.write_text(json.dumps({**counts, _SENT: 0}))  # begun
        self.sent.send(path)
        file.write_text(json.dumps({**counts, _SENT: size}))
        path.unlink()

    def _records(self, examples: range, number: int, part: _Part) -> Iterator[bytes]:
        """Yield the records of a shard; the last one has its mark, which is alone where no example can be used."""
        last = None
        for index in examples:
            found = self._example(index, part)
            if self.bar is not None:
                self.bar.update(1)
            if found is None:
                continue
            if last is not None:
                yield last[2]
            last = found
            part.written += 1
        mark = shard_set.Mark(self.set, number, self.count, part.written)
        origin, example = (Origin(), {}) if last is None else last[:2]
        yield _packed(origin, {**example, shard_set.MARK: dataclasses.asdict(mark)})

    def _example(self, index: int, part: _Part) -> tuple[Origin, dict[str, Any], bytes] | None:
        origin, record, untagged = self.source.read(index)
        try:
            if isinstance(record, ExampleError):
                raise record
            roots = (str(Path(origin.file).parent), *([self.media_root] if self.media_root else []))
            whole = embed(record, origin, roots)
            if self.frames is not None:
                whole = with_frames(whole, origin, shared_reader(), self.frames)
            if shard_set.MARK in whole:
                raise ExampleError(origin, shard_set.MARK, "a name that shards use themselves", "Rename the column")
            packed = _packed(origin, whole)
        except ExampleError as error:
            if not self.skip:
                raise
            part.rejected.append(Rejected.of(error, "bad"))
            return None
        part.untagged += untagged > 0
        return origin, whole, packed


def _packed(origin: Origin, example: dict[str, Any]) -> bytes:
    try:
        return msgpack.packb(example)
    except (ValueError, TypeError, OverflowError) as error:
        raise ExampleError(
            origin,
            "example",
            f"cannot be written as msgpack ({error})",
            "Correct the column that holds it, or hide it: --columns NAME=_",
        ) from error


def source_identity(source: ExampleSource) -> str:
    """Return what tells the examples of files from those of others: a digest of what they hold and how it is read."""
    value = hashlib.sha256(repr(dataclasses.astuple(source.options)).encode())
    value.update(repr(source).encode())
    for path in source.files:
        with open(path, "rb") as file:
            value.update(hashlib.file_digest(file, "sha256").digest())
    return value.hexdigest()


@contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """Yield a folder inside ``output`` for shards that are not whole yet.

    Raises:
      UserError: ``output`` holds shards already; it is not a folder, or is being written to.
    """
    folder = output / _UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: no folder can be made there ({error.strerror}). Choose another --output") from error
    with open(folder / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{output}: another process is writing shards there. Wait, or choose another") from error
        if any(output.glob(f"*{SHARD_SUFFIX}")):
            if {path.name for path in folder.iterdir()} == {_LOCK}:
                shutil.rmtree(folder)
            raise UserError(f"{output} holds shards already; remove them or choose another folder")
        yield folder

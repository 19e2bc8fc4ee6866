"""Examples written as shards that carry their images with them, so that the folder can be moved anywhere."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack

from jvlm.data import shard_set, stores
from jvlm.data.embedding import embed
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.shards import SHARD_SUFFIX, ExampleSource, write_records
from jvlm.errors import UserError
from jvlm.progress import Progress

_UNFINISHED = ".unfinished"
_LOCK = "lock"


def shard(files: Sequence[str], output: str | Path, examples_per_shard: int, *, media_root: str | None = None) -> str:
    """Write examples as shards of ``examples_per_shard`` in a folder, media files read into them. Returns a summary.

    The shards appear in the folder when all of them are whole; an interrupted sharding leaves none.

    Args:
      media_root: folder for relative media paths, after the data file's own.

    Raises:
      ExampleError: an example that cannot be used, or an image that cannot be read; nothing is left out silently.
      UserError: the folder holds shards already.
      UserError: a wrong argument, files that cannot be read, or a folder that cannot be written.
    """
    if examples_per_shard < 1:
        raise UserError(f"examples_per_shard is {examples_per_shard}; it must be at least 1")
    if stores.is_remote(output):
        raise UserError(f"{output}: shards are written to this machine's disk. Give a folder on it, and copy that")
    output = Path(output)
    source = ExampleSource(files)
    with _unfinished(output) as folder:
        examples = iter(Progress(_embedded(source, media_root), total=len(source), desc="sharding", unit="example"))
        names = _write(examples, folder, len(source), examples_per_shard, _identity(source, examples_per_shard))
        for name in names:
            (folder / name).replace(output / name)
    return f"{len(source)} examples in {len(names)} shard(s) under {output}"


def _embedded(source: ExampleSource, media_root: str | None) -> Iterator[tuple[Origin, dict[str, Any]]]:
    for origin, example in map(source.__getitem__, range(len(source))):
        if isinstance(example, ExampleError):
            raise example
        roots = (str(Path(origin.file).parent), *([media_root] if media_root else []))
        whole = embed(example, origin, roots)
        if shard_set.MARK in whole:
            raise ExampleError(origin, shard_set.MARK, "a name that shards use themselves", "Rename the column")
        yield origin, whole


def _write(
    examples: Iterator[tuple[Origin, dict[str, Any]]], folder: Path, total: int, examples_per_shard: int, identity: str
) -> list[str]:
    """Write the shards. Returns their names."""
    count = -(-total // examples_per_shard)
    names = []
    for number in range(count):
        size = min(examples_per_shard, total - number * examples_per_shard)
        mark = {shard_set.MARK: dataclasses.asdict(shard_set.Mark(identity, number, count, size))}
        own = itertools.islice(examples, size)
        records = (
            _packed(origin, example if place else {**example, **mark}) for place, (origin, example) in enumerate(own)
        )
        names.append(shard_set.shard_name("examples", number, count, SHARD_SUFFIX))
        write_records(folder / names[-1], records)
    return names


def _packed(origin: Origin, example: dict[str, Any]) -> bytes:
    try:
        return msgpack.packb(example)
    except (ValueError, TypeError, OverflowError) as error:
        raise ExampleError(
            origin, "example", f"cannot be written as msgpack ({error})", "Correct or remove the column that holds it"
        ) from error


def _identity(source: ExampleSource, examples_per_shard: int) -> str:
    """What tells sets of other examples, or of other sizes, from this one."""
    value = hashlib.sha256(str(examples_per_shard).encode())
    for path in source.files:
        with open(path, "rb") as file:
            value.update(hashlib.file_digest(file, "sha256").digest())
    return value.hexdigest()[:16]


@contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """A folder inside ``output`` for shards that are not whole yet; it and they are gone afterwards.

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
        try:
            if any(output.glob(f"*{SHARD_SUFFIX}")):
                raise UserError(f"{output} holds shards already; remove them or choose another folder")
            for left in folder.iterdir():  # by a process that was killed
                if left.name != _LOCK:
                    left.unlink()
            yield folder
        finally:
            shutil.rmtree(folder)

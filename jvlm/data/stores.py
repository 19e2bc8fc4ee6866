"""Object stores (gs://bucket/...): their paths, and local copies of what cannot be read from there.

Arrays of runs are read and written in the store itself, by Orbax and tensorstore. Readers of examples and safetensors
want files on a disk: these are copied once, under ``copies/``, and again only when their size or time has changed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from jvlm.errors import UserError
from jvlm.units import GIB, MIB

COPIES = Path("copies")
OUTLINES = COPIES / "outlines"  # of files that are copied as they are read (`jvlm.data.readers.copied`)
_PIECE = 64 * MIB  # of a file that are fetched in one request
CONNECTIONS = 32  # at a time, of requests about many files
# what etils reaches a store through, unless TensorFlow is installed
_THROUGH = {"gs": ("gcsfs", "jvlm[gcs]"), "s3": ("s3fs", "s3fs")}
# kinds of weights that are not read; every other file of a model's folder is copied
_OTHER_WEIGHTS = (".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


class StoreError(UserError):
    """An object store does not answer, or does not let this machine read."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is one of an object store."""
    return "://" in str(path)


def is_known(path: str) -> bool:
    """Whether a path is an address of a kind of object store that jvlm reaches."""
    return path.partition("://")[0] in _THROUGH and is_remote(path)


def on_disk(path: str | os.PathLike, what: str) -> Path:
    """Return a path to write to. Raises UserError for one of an object store, to which ``what`` is not written."""
    if is_remote(path):
        raise UserError(f"{path}: {what} written to this machine's disk. Give a path on it, and copy that")
    return Path(path)


def at(path: str) -> epath.Path:
    """Return a path on disk or in a store.

    Raises:
      UserError: what reaches such a store is not installed; the message says how to.
    """
    scheme, remote, _ = path.partition("://")
    package, install = _THROUGH.get(scheme, ("", "")) if remote else ("", "")
    if package and not any(importlib.util.find_spec(name) for name in (package, "tensorflow")):
        raise UserError(f"{path}: {scheme}:// is reached through {package}: pip install '{install}'")
    return epath.Path(path)


@contextlib.contextmanager
def answering(remote: str) -> Iterator[None]:
    """Make what a store's client raises inside a `StoreError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each client has errors of its own
        raise StoreError(
            f"{remote} cannot be reached ({type(error).__name__}: {str(error)[:300]}). Check the network, and that "
            "this machine may read the bucket; the same command goes on"
        ) from error


def copy(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copy one file, between disk and store either way."""
    with epath.Path(source).open("rb") as reader, epath.Path(target).open("wb") as writer:
        shutil.copyfileobj(reader, writer, 2**20)


def place_of(remote: str | os.PathLike) -> Path:
    """Where the local copy of a remote file or folder is."""
    return COPIES / str(remote).replace("://", "/")


def remote_of(local: str | os.PathLike) -> str | None:
    """Return the address of the file whose copy belongs at a place on this machine; None for places of no copy.

    ``..`` in it leads no further up than the bucket.
    """
    copies, given = os.path.join(os.path.abspath(COPIES), ""), os.path.join(os.getcwd(), local)
    place = os.path.normpath(given)
    if not (given.startswith(copies) and place.startswith(copies)):
        return None
    named, (scheme, *found) = (path.removeprefix(copies).split(os.sep) for path in (given, place))
    is_file = len(found) > 1 and named[:2] == [scheme, found[0]]
    return f"{scheme}://{'/'.join(found)}" if scheme in _THROUGH and is_file else None


def read_range(file: epath.Path, start: int, end: int) -> bytes:
    """Return the bytes of a remote file from ``start`` to ``end``; no others are fetched, as an open file would ahead.

    Where TensorFlow is what reaches the store, it is.
    """
    known = _client_of(str(file))
    if known is not None:
        store, path = known
        return store.cat_file(path, start=start, end=end) if end > start else b""
    with file.open("rb") as reader:
        reader.seek(start)
        return reader.read(max(end - start, 0))


class Stat(NamedTuple):
    """Bytes of a remote file, and the second in which it was written."""

    length: int
    mtime: int


def stat_of(file: epath.Path, *, listed: bool = False) -> Stat:
    """Return the size and the time of a remote file.

    Args:
      listed: take what `find` listed, if it did; else the store is asked.

    Raises:
      FileNotFoundError: there is none; a folder is no file.
    """
    known = _client_of(str(file))
    if known is None:
        stat = file.stat()
        if stat.is_directory:
            raise FileNotFoundError(f"{file} is a folder")
        return Stat(stat.length, stat.mtime)
    store, path = known
    if not listed:
        store.invalidate_cache(path)
    info = store.info(path)
    if info["type"] != "file":
        raise FileNotFoundError(f"{file} is a folder")
    # of s3fs the second name; without a time, a file that changed and kept its size would pass as the one before
    time = next(info[name] for name in ("mtime", "LastModified", "last_modified") if name in info)
    return Stat(info["size"], int(time.timestamp()))


def _client_of(path: str) -> tuple[Any, str] | None:
    """Return (client of a store, name of a file in it); None where TensorFlow is what reaches it."""
    scheme, _, _ = path.partition("://")
    package, _ = _THROUGH.get(scheme, ("", ""))
    if not package or not importlib.util.find_spec(package):
        return None
    import fsspec  # which these packages bring

    return fsspec.core.url_to_fs(path)


def is_current(target: Path, stat: Stat) -> bool:
    """Whether a local file has the size and the time of a remote one."""
    there = target.stat() if target.is_file() else None
    return there is not None and (there.st_size, int(there.st_mtime)) == (stat.length, int(stat.mtime))


@contextlib.contextmanager
def written(target: Path, stat: Stat) -> Iterator[Path]:
    """Give the name of a file to be written, which becomes ``target``, with a remote file's time, once it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # processes of one machine may copy the same file; each renames a whole one
    part = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        yield part
        os.utime(part, (stat.mtime, stat.mtime))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def fetch_one(file: epath.Path, target: Path) -> None:
    """Copy a remote file. Raises FileNotFoundError where there is none."""
    stat = stat_of(file)
    with written(target, stat) as part:
        if _client_of(str(file)) is None:
            copy(file, part)
            return
        with open(part, "wb") as local:
            for start in range(0, stat.length, _PIECE):
                local.write(read_range(file, start, min(start + _PIECE, stat.length)))


def fetch(files: Iterable[epath.Path], why: str = "") -> list[Path]:
    """Local copies of remote files, each as new as its source; says what it copies, where to, and ``why``.

    Raises:
      UserError: too little space on the disk, with both numbers.
    """
    targets, missing = [], []
    for file in files:
        target, stat = place_of(file), stat_of(file)
        targets.append(target)
        if not is_current(target, stat):
            missing.append((file, target, stat))
    if missing:
        check_space(missing)
        size = sum(stat.length for _, _, stat in missing)
        reason = f" ({why})" if why else ""
        print(
            f"copying {len(missing)} files, {size / GIB:.2f} GiB, to {COPIES.absolute()}: {missing[0][0]} ...{reason}"
        )
    for file, target, _ in missing:
        fetch_one(file, target)
    return targets


def check_space(missing: Sequence[tuple[epath.Path, Path, Stat]]) -> None:
    """Raise UserError if (file, place of its copy, its stat) of some are more than the disk has room for."""
    COPIES.mkdir(parents=True, exist_ok=True)
    size, free = sum(stat.length for *_, stat in missing), shutil.disk_usage(COPIES).free
    if size > free:
        raise UserError(
            f"{missing[0][0]} and {len(missing) - 1} more files to copy are {size / GIB:.2f} GiB, but "
            f"{COPIES.absolute()} has {free / GIB:.2f} GiB free; make room, or start where there is more"
        )


def find(pattern: str) -> list[epath.Path]:
    """Return the remote files that match a path or glob, sorted; empty if none does."""
    folder, _, name = pattern.rpartition("/")
    parent, known = at(folder), _client_of(pattern)
    if known is not None:  # one listing says which are files; else each is asked
        store, path = known
        store.invalidate_cache()
        found = store.glob(path, detail=True)
        scheme = pattern.partition("://")[0]
        return sorted(at(f"{scheme}://{name}") for name, info in found.items() if info["type"] == "file")
    paths = parent.glob(name) if any(c in pattern for c in "*?[") else [parent / name]
    paths = list(paths)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        are_files = list(pool.map(lambda path: path.exists() and not path.is_dir(), paths))
    return sorted(path for path, is_file in zip(paths, are_files, strict=True) if is_file)


def model_folder(path: str | os.PathLike, inside: tuple[str, ...] = ()) -> Path:
    """Return a model's folder on disk: itself, or a local copy of the files in a remote one.

    Args:
      inside: folders in it to copy too. Others (checkpoints, other formats) are not.

    Raises:
      UserError: no such remote folder, no way to the store, or too little space.
    """
    if not is_remote(path):
        return Path(path)
    remote = at(str(path))
    if not remote.is_dir():
        raise UserError(f"{path} is not a folder, or not one that this machine may read")
    folders = [remote, *(remote / name for name in inside if (remote / name).is_dir())]
    files = [path for folder in folders for path in folder.iterdir() if not path.is_dir()]
    fetch(sorted(path for path in files if not path.name.endswith(_OTHER_WEIGHTS)))
    return place_of(remote)

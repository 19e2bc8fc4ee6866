"""Images and videos beside data files of an object store: copied to this machine when an example first needs them.

A data file of a store is read from its copy (`jvlm.data.stores`). What it names relative to itself belongs at the same
place among the copies, and is fetched there from the place of that name in the store.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

from jvlm.data import stores

_LONGEST = 1024  # bytes of an object's name
_LOCK = threading.Lock()
_SEEN: dict[tuple[str, str], bool] = {}  # (folder of the run, place) -> whether it is there and current


def root_of(folder: str) -> Path:
    """Return the folder on this machine that media of a folder are looked up in: of one in a store, that of copies."""
    if stores.is_remote(folder):
        return stores.place_of(folder)
    path = Path(folder)
    if str(stores.OUTLINES) not in folder:  # most are not; they are looked at for every image
        return path
    # a file that is copied as it is read is known by its outline
    outlines = stores.OUTLINES.absolute()
    here = path.absolute()
    return stores.COPIES / here.relative_to(outlines) if here.is_relative_to(outlines) else path


def fetched(path: Path) -> bool:
    """Copy the file that belongs at a place among the copies, unless it is there and current; False if there is none.

    The store is asked once for each file and process.

    Raises:
      StoreError: the store does not answer.
      UserError: too little space on the disk.
    """
    remote = stores.remote_of(path) if str(stores.COPIES) in str(path) else None
    if remote is None or len(remote.encode()) > _LONGEST:
        return False
    key = os.getcwd(), remote
    if key not in _SEEN:
        found = _fetch(remote)
        with _LOCK:
            _SEEN[key] = found
    return _SEEN[key]


def _fetch(remote: str) -> bool:
    with stores.answering(remote):
        file, target = stores.at(remote), stores.place_of(remote)
        try:
            stat = stores.stat_of(file)
        except FileNotFoundError:
            return False
        if not stores.is_current(target, stat):
            stores.check_space([(file, target, stat)])
            with _LOCK:  # of which threads would print one each
                _say_once(stores.COPIES.absolute())
            stores.fetch_one(file, target)
    return True


@functools.cache
def _say_once(folder: Path) -> None:
    print(
        f"images and videos beside data files of a store are copied to {folder} one by one, as they are read; "
        "shards of jvlm data convert hold them and are read faster",
        flush=True,
    )

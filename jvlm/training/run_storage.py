"""Where a run is: a folder on disk, or an object store's address (gs://, s3://) with a local copy of small files.

Arrays go straight to the store, through Orbax and tensorstore. Everything else (log, curves, configuration, reports) is
written by libraries that append to files, which object stores cannot: it is written to a local folder and copied.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
from etils import epath

from jvlm.data import stores
from jvlm.parallel import hosts
from jvlm.weights.run_dir import CHECKPOINTS, POINTER, PROCESSOR

LOCAL_COPIES = "runs"
# in the folder of a run, but runs or processes of their own, or about this machine only
_APART = ("stages", "processes", CHECKPOINTS, POINTER)


class RunStorage:
    """The folders of one run.

    Attributes:
      folder: small files. On disk it is the same for all processes; the local copies of a store are each process's own.
      store: arrays. The same for all processes.

    Args:
      root: `Experiment.output_root`; with "://" an object store, whose local copy lies under ``runs/``.
      name: `Experiment.name`.
    """

    def __init__(self, root: str, name: str):
        self._root, self._name = root.rstrip("/"), name
        self.store = stores.at(root) / name
        self._remote: epath.Path | None = None
        self._copied: dict[Path, tuple[int, int]] = {}
        if stores.is_remote(root):
            part = () if hosts.is_rank0() else ("processes", str(jax.process_index()))
            self.folder = Path(LOCAL_COPIES, root.replace("://", "/"), name, *part)
            self._remote = self.store.joinpath(*part)
        else:
            self.folder = Path(root) / name
            self.store = self.store.absolute()

    def pull(self) -> None:
        """Fill the local copy from the store, and note in it where the checkpoints are."""
        if self._remote is None:
            return
        for source in {self.store, self._remote}:
            self._pull(source, self.folder)
        (self.folder / POINTER).write_text(f"{self.store / CHECKPOINTS}\n")

    def elsewhere(self, relative: str) -> str | None:
        """Return the address of a path relative to a run in an object store; None for a run on disk."""
        return None if self._remote is None else f"{self._root}/{os.path.normpath(os.path.join(self._name, relative))}"

    def share(self) -> None:
        """Give the other processes what the first has written."""
        if hosts.is_rank0():
            self.push()
        hosts.barrier("the run folder is in the store")
        if not hosts.is_rank0():
            self.pull()

    def _pull(self, source: epath.Path, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir() if source.is_dir() else ():
            if path.is_dir():
                # arrays stay in the store; other processes' files, other stages' and traces are not needed to go on
                if path.name == PROCESSOR:
                    self._pull(path, target / path.name)
            else:
                stores.copy(path, target / path.name)
                self._copied[target / path.name] = _stamp(target / path.name)

    def push(self) -> None:
        """Copy to the store what has changed since the last time."""
        if self._remote is None:
            return
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            relative, stamp = path.relative_to(self.folder), _stamp(path)
            if relative.parts[0] in _APART or self._copied.get(path) == stamp:
                continue
            target = self._remote / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            stores.copy(path, target)
            self._copied[path] = stamp


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size

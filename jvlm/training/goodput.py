"""Goodput: how much of the time since a run first began its devices spent on steps that count."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jvlm.parallel import hosts
from jvlm.training.side_files import read_json, write_json

CLOCK = "clock.json"


class Goodput:
    """Useful step time / wall time. Use as a context manager.

    Useful is a step from the moment the device could begin it (it was handed over, and the step before was done) until
    it was done. All else lowers the figure: waiting for data, compilation, stalls of checkpoints, the time between two
    starts, steps that a restart runs again, steps skipped because they were not finite.

    Args:
      folder: of the run; keeps when it first began.
      useful: seconds from before a restart.
    """

    def __init__(self, folder: Path, useful: float = 0.0):
        self._began = hosts.broadcast_from_0(_first_begun(folder / CLOCK) if hosts.is_rank0() else None)
        self._useful = useful
        self._done = 0.0
        self._first = True
        self._watch = ThreadPoolExecutor(1, "goodput")

    def __enter__(self) -> Goodput:
        return self

    def __exit__(self, *_: Any) -> None:
        self._watch.shutdown(cancel_futures=True)

    def ran(self, began: float, metrics: dict[str, jax.Array]) -> None:
        """A step was handed over: ``began`` is `time.perf_counter` before its call. The first call compiled it."""
        began = time.perf_counter() if self._first else began
        self._first = False
        self._watch.submit(self._wait, began, metrics["skipped"])

    def _wait(self, began: float, skipped: jax.Array) -> None:
        counts = not float(skipped)
        done = time.perf_counter()
        self._useful += counts * (done - max(began, self._done))
        self._done = done

    def seconds(self) -> float:
        """Useful seconds so far."""
        return self._useful

    def share(self) -> float:
        """Useful / wall time."""
        return self._useful / max(time.time() - self._began, 1e-9)


def _first_begun(path: Path) -> float:
    if not path.is_file():
        write_json(path, {"began": time.time()})
    return read_json(path, "remove it: goodput then counts from this start")["began"]

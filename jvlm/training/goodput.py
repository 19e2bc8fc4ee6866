"""Goodput: how much of the time since a run first began its devices spent on steps that count."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jvlm.parallel import hosts
from jvlm.training.hooks import Hook, StepResult
from jvlm.training.side_files import read_json, write_json

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer

CLOCK = "clock.json"


class Goodput(Hook):
    """Useful step time / wall time.

    Useful is a step from the moment the device could begin it (it was handed over, and the step before was done) until
    it was done. All else lowers the figure: waiting for data, compilation, stalls of checkpoints, the time between two
    starts, steps that a restart runs again, steps skipped because they were not finite.

    Args:
      folder: of the run; a file in it holds when it first began.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._useful = self._done = 0.0
        self._first = True
        self._watch = ThreadPoolExecutor(1, "goodput")

    def on_train_start(self, trainer: Trainer) -> None:
        self._began = hosts.broadcast_from_0(_first_begun(self._folder / CLOCK) if hosts.is_rank0() else None)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        # the first call compiled it
        began = time.perf_counter() if self._first else result.began
        self._first = False
        self._watch.submit(self._wait, began, result.metrics["skipped"])

    def on_stop(self, trainer: Trainer, error: BaseException | None) -> None:
        self._watch.shutdown(cancel_futures=True)

    def _wait(self, began: float, skipped: jax.Array) -> None:
        counts = not float(skipped)
        done = time.perf_counter()
        self._useful += counts * (done - max(began, self._done))
        self._done = done

    def state(self) -> float:
        """Return the useful seconds so far."""
        return self._useful

    def restore(self, state: float, step: int) -> None:
        self._useful = state

    def log_values(self, trainer: Trainer) -> dict[str, float]:
        return {"goodput": self._useful / max(time.time() - self._began, 1e-9)}


def _first_begun(path: Path) -> float:
    if not path.is_file():
        write_json(path, {"began": time.time()})
    return read_json(path, "remove it: goodput then counts from this start")["began"]

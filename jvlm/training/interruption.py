"""Being asked to stop: SIGTERM, Ctrl-C, a preemption notice. The step is finished and saved, then the run ends."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.experimental import multihost_utils

from jvlm.training.hooks import Hook, StepResult

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer

# "try again later" of sysexits.h: the same command goes on where this run stopped
EXIT_STATUS = 75


class Interrupted(Exception):
    """The run stopped as it was asked to; its last step is saved."""


def stopped(trainer: Trainer, steps: int, saved: str | Path) -> Interrupted:
    """Return the error of a run that was stopped: where its last step is saved, and what goes on from there."""
    ways = (hook.goes_on(trainer) for hook in trainer.hooks)
    way = next(filter(None, ways), "the same command goes on from there")
    return Interrupted(
        f"stopped by {trainer.stop_reason} after step {trainer.step} of {steps}, which is saved in {saved}; {way}"
    )


class StopRequests(Hook):
    """Stops the run after the step in which a signal came. A second Ctrl-C stops at once, as Python does by itself.

    With several processes, JAX's coordination service takes SIGTERM from whichever of them gets it and makes all stop
    after the same step; a Ctrl-C is passed on to it as one.
    """

    def __init__(self):
        self._asked: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer | None) -> None:
        if threading.current_thread() is threading.main_thread():
            several = jax.distributed.is_initialized()
            for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def on_stop(self, trainer: Trainer | None, error: BaseException | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self._asked == name:
            raise KeyboardInterrupt
        self._asked = name
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        request = self.after(result.step)
        if request is not None:
            trainer.stop(request)

    def after(self, step: int) -> str | None:
        """Return what asks to stop after this step, the same on all processes. Call it at every step."""
        if jax.distributed.is_initialized():
            return "a preemption notice" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._asked

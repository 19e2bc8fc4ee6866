"""Being asked to stop: SIGTERM, Ctrl-C, a preemption notice. The step is finished and saved, then the run ends."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

# "try again later" of sysexits.h: the same command goes on where this run stopped
EXIT_STATUS = 75


class Interrupted(Exception):
    """The run stopped as it was asked to; what it had learnt is saved."""


class StopRequests:
    """Notices signals while it is entered. A second Ctrl-C stops at once, as Python does by itself.

    With several processes, JAX's coordination service takes SIGTERM from whichever of them gets it and makes all stop
    after the same step; a Ctrl-C is passed on to it as one.
    """

    def __init__(self):
        self._asked: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            together = jax.distributed.is_initialized()
            for number in (signal.SIGINT,) if together else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self._asked == name:
            raise KeyboardInterrupt
        self._asked = name
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)

    def after(self, step: int) -> str | None:
        """What asks to stop after this step, the same for all processes; None for going on. Call it at every step."""
        if jax.distributed.is_initialized():
            return "a preemption notice" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._asked

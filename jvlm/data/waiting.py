"""A line in the log while nothing comes: what is waited for, and since when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

SECONDS = 60.0  # after which it is said, again and again


class Waiting:
    """Says what is waited for, when that takes long. Use it as a context manager, and call `now` for each thing.

    Args:
      describe: a thing in words; called in another thread, and only when it takes long.
      seconds: how long; None is `SECONDS`.
    """

    def __init__(self, describe: Callable[[Any], str], seconds: float | None = None):
        self._describe, self._seconds = describe, SECONDS if seconds is None else seconds
        self._thing: Any = None
        self._begun = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="jvlm-waiting", daemon=True)

    def now(self, thing: Any) -> None:
        """Wait for this from now on."""
        self._thing, self._begun = thing, time.monotonic()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()

    def _watch(self) -> None:
        said = self._begun
        while not self._end.wait(self._seconds / 10):
            begun, thing, now = self._begun, self._thing, time.monotonic()
            said = max(said, begun)
            if now - said >= self._seconds:
                said = now
                print(f"waiting for data for {now - begun:,.0f} s: {self._describe(thing)}", flush=True)

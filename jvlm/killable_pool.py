"""Work in processes that are killed when it takes too long, and replaced."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, Self


class KillablePool:
    """A pool of spawned processes, each replaced after some tasks. Use it as a context manager, or call `close`.

    Args:
      pebble: the library, which callers import: it is in extras.
      workers: processes.
      tasks: of a process.
      begin, arguments: called in each process as it begins.
    """

    def __init__(
        self, pebble: ModuleType, workers: int, tasks: int, begin: Callable[..., None], arguments: tuple[Any, ...] = ()
    ):
        self._expired = pebble.ProcessExpired
        self._pool = pebble.ProcessPool(
            max_workers=workers,
            max_tasks=tasks,
            initializer=begin,
            initargs=arguments,
            context=multiprocessing.get_context("spawn"),
        )
        # Python waits for all its child processes when it ends, and these would wait for tasks
        self._stop = multiprocessing.util.Finalize(None, _stop, (self._pool,), exitpriority=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the processes."""
        self._stop()


def _stop(pool: Any) -> None:
    pool.stop()
    pool.join()

"""Several processes that run one program: starting them, exchanging JSON values, and failing together.

Rank 0 is process 0. With one process nothing here communicates.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jvlm.errors import UserError

T = TypeVar("T")


def initialise(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, timeout: int = 300
) -> None:
    """Join the other processes. Call this before anything asks for devices.

    Args:
      coordinator: host:port of process 0; None lets JAX find it, on a TPU pod, under SLURM or Open MPI.
      processes, process: how many there are, and which this is; given with ``coordinator``.
      timeout: seconds to wait for the others.

    Raises:
      UserError: only some of the three are given.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise UserError(
            f"give coordinator, processes and process together, or none of them; got {coordinator}, {processes}, "
            f"{process}"
        )
    # processes on CPUs talk through gloo; other devices have their own network
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout)


def is_rank0() -> bool:
    """Return whether this is process 0, which writes logs and reports."""
    return jax.process_index() == 0


def all_gather_object(value: Any) -> list[Any]:
    """Return a JSON value of each process, in order. Every process must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(text), np.int64))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(t[: int(n)]).decode()) for t, n in zip(texts, lengths, strict=True)]


def all_gather_concat(values: list[Any]) -> list[Any]:
    """Return the lists of all processes as one list. Every process must call it."""
    return [value for values_of_process in all_gather_object(values) for value in values_of_process]


def broadcast_from_0(value: Any) -> Any:
    """Return the JSON value of process 0. Every process must call it."""
    return all_gather_object(value)[0]


class PeerFailed(RuntimeError):
    """Another process failed; ``is_user_error`` tells whether with a `UserError`."""

    def __init__(self, message: str, is_user_error: bool):
        super().__init__(message)
        self.is_user_error = is_user_error


def run_on_all(work: Callable[[], T]) -> T:
    """Return the result of ``work``, which must not communicate. Every process must call it.

    If it raises on one process, all processes raise once all have finished, so that none waits for one that failed.

    Raises:
      PeerFailed: on the processes where ``work`` succeeded; the message names the process that failed and its error.
    """
    result = failure = None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001  (raised below, once the others know)
        failure = error
    failures = all_gather_object(
        None if failure is None else [f"{type(failure).__name__}: {failure}", isinstance(failure, UserError)]
    )
    if failure is not None:
        raise failure
    for process, other in enumerate(failures):
        if other is not None:
            message, is_user_error = other
            raise PeerFailed(f"process {process} failed: {message}", is_user_error)
    return result


def log_rank0(text: str) -> None:
    """Print a line on process 0."""
    if is_rank0():
        print(text)


def barrier(name: str) -> None:
    """Wait until every process has called this; ``name`` is for the error message where one does not."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def abort(status: int, *, seconds: float = 10.0) -> None:
    """Exit this process after a failure. The others, which may be waiting for it in a collective, are soon ended too.

    Without this, JAX would wait for them at exit for five minutes. If all processes call it, all exit orderly.
    """
    end = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    end.start()
    end.join(seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

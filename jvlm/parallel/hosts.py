"""Several processes, one program: how they find one another, what each reads, and who speaks.

With one process nothing here communicates.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jvlm.data.errors import MISTAKES
from jvlm.models.batch import PackedBatch

T = TypeVar("T")


def initialise(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, timeout: int = 300
) -> None:
    """Join the other processes. Call before anything asks for devices.

    Args:
      coordinator: host:port of process 0; None lets JAX find it, on a TPU pod, under SLURM or Open MPI.
      processes, process: how many there are, and which this is; given with ``coordinator``.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: only some of the three are given.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError(
            f"give coordinator, processes and process together, or none of them; got {coordinator}, {processes}, "
            f"{process}"
        )
    # processes on CPUs talk through gloo; other devices have their own network
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout)


def is_first() -> bool:
    """Whether this process writes logs and speaks for all."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """A JSON value of each process, in order; every process must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(text), np.int64))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(t[: int(n)]).decode()) for t, n in zip(texts, lengths, strict=True)]


def join(values: list[Any]) -> list[Any]:
    """The lists of all processes as one; every process must call it."""
    return [value for own in gather(values) for value in own]


def agree(value: Any) -> Any:
    """The JSON value of process 0, on every process."""
    return gather(value)[0]


class Failed(RuntimeError):
    """Another process failed; ``mistake`` says that it was for one of `MISTAKES`."""

    def __init__(self, said: str, mistake: bool):
        super().__init__(said)
        self.mistake = mistake


def together(work: Callable[[], T]) -> T:
    """What ``work`` gives, which must communicate with nobody; every process must call it.

    Where it raises on one process all raise, once all are done: so none waits for one that has failed.

    Raises:
      Failed: on the others; it names the process, and what that said.
    """
    result = failed = None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001  (raised below, once the others know)
        failed = error
    said = gather(None if failed is None else [f"{type(failed).__name__}: {failed}", isinstance(failed, MISTAKES)])
    if failed is not None:
        raise failed
    for process, other in enumerate(said):
        if other is not None:
            text, mistake = other
            raise Failed(f"process {process} failed: {text}", mistake)
    return result


def say(text: str) -> None:
    """A line on the terminal of process 0."""
    if is_first():
        print(text)


def wait(name: str) -> None:
    """Until every process has come here; ``name`` is for the error where one does not."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def leave(status: int, *, seconds: float = 10.0) -> None:
    """End this process after a failure; the others, which may be waiting for it in a collective, are soon ended too.

    JAX would first wait for them at its own end, for five minutes. If they all end, this is an orderly end.
    """
    end = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    end.start()
    end.join(seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@dataclasses.dataclass(frozen=True)
class Part:
    """What a process reads of every batch.

    Attributes:
      rows: of which its devices hold a part, ascending.
      index, count: which of how many parts of equal size these rows are.
      counts: whether it is the first process with these rows. Others have them where a row is split over hosts.
    """

    rows: tuple[int, ...]
    index: int
    count: int
    counts: bool


def part_of(tokens: jax.ShapeDtypeStruct) -> Part:
    """The part of this process.

    Args:
      tokens: shape [accumulation, rows, places] and sharding of a step's tokens.

    Raises:
      ValueError: processes whose rows overlap without being the same.
    """
    found: dict[int, set[int]] = {}
    for device, index in tokens.sharding.devices_indices_map(tokens.shape).items():
        found.setdefault(device.process_index, set()).update(range(*index[1].indices(tokens.shape[1])))
    parts = {process: tuple(sorted(rows)) for process, rows in sorted(found.items())}
    distinct = sorted(set(parts.values()))
    if len({len(rows) for rows in distinct}) > 1 or sum(map(len, distinct)) != tokens.shape[1]:
        raise ValueError(f"the mesh gives processes rows that overlap in part: {parts}; choose other axis sizes")
    own = parts[jax.process_index()]
    first = next(process for process, rows in parts.items() if rows == own)
    return Part(own, distinct.index(own), len(distinct), first == jax.process_index())


def place(batches: PackedBatch, rows: tuple[int, ...], shapes: PackedBatch) -> PackedBatch:
    """Device arrays of all rows from those of this process.

    Args:
      batches: host arrays [accumulation, own rows, ...].
      rows: which rows of the whole they are.
      shapes: shape and sharding of the whole.
    """
    at = {row: place for place, row in enumerate(rows)}

    def of(value: np.ndarray, shape: jax.ShapeDtypeStruct) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            own = [at[row] for row in range(*index[1].indices(shape.shape[1]))]
            return value[index[0]][:, own[0] : own[-1] + 1][(slice(None), slice(None), *index[2:])]

        return jax.make_array_from_callback(shape.shape, shape.sharding, part)

    return jax.tree.map(of, batches, shapes)

"""Threads or processes that read the examples of a pipeline and decode their images."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, Protocol

import cloudpickle
import numpy as np

from jvlm.data.recycled import SharedLocation, opened, recycled, shared_location
from jvlm.data.unread_patches import UnreadImage
from jvlm.errors import UserError

if TYPE_CHECKING:
    from jvlm.data.processor import Processor

_STOPPED = (
    "a process that reads data ended before its work was done: it ran out of memory or was killed. Lower "
    "data.worker_processes, or in a script of your own put what it does under if __name__ == '__main__'"
)


class Result(Protocol):
    """What a worker will have done."""

    def result(self) -> Any:
        """Wait for it. Raises what it raised."""
        ...

    def cancel(self) -> bool:
        """Leave it undone if it has not begun."""
        ...

    def wait(self) -> None:
        """Wait until it is done or has failed; not for what was cancelled."""
        ...


class Workers(Protocol):
    """What reads examples and decodes images beside the thread that packs."""

    def example(self, number: int) -> Result:
        """Return an element of the dataset."""
        ...

    def patches(self, unread: UnreadImage, out: np.ndarray) -> Result:
        """Write the patches of an image."""
        ...

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array for patches, whose values mean nothing."""
        ...

    def close(self) -> None:
        """Stop. What has begun comes to an end."""
        ...


class Threads:
    """Reads in threads of this process.

    Args:
      dataset: elements by number.
      count: threads.
    """

    def __init__(self, dataset: Any, processor: Processor, count: int):
        self._dataset, self._processor = dataset, processor
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="jvlm-data")

    def example(self, number: int) -> Result:
        """Return an element of the dataset."""
        return _Submitted(self._pool.submit(self._dataset.__getitem__, number))

    def patches(self, unread: UnreadImage, out: np.ndarray) -> Result:
        """Write the patches of an image."""
        return _Submitted(self._pool.submit(self._processor.write_patches, unread, out))

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array for patches, whose values mean nothing."""
        return recycled(shape)

    def close(self) -> None:
        """Stop. What has begun comes to an end."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Processes:
    """Reads in processes of their own, which end with this one, however it ends.

    Args:
      dataset: elements by number.
      count: processes.
    """

    def __init__(self, dataset: Any, processor: Processor, count: int):
        task = cloudpickle.dumps((dataset, processor))
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(task,))

    def example(self, number: int) -> Result:
        """Return an element of the dataset."""
        return _Submitted(self._pool.submit(_example, number))

    def patches(self, unread: UnreadImage, out: np.ndarray) -> Result:
        """Write the patches of an image, in the process itself where it can reach the array."""
        location = shared_location(out)
        if location is not None:
            return _Submitted(self._pool.submit(_write, unread, location))
        return _Submitted(self._pool.submit(_patches, unread, out.shape), lambda patches: np.copyto(out, patches))

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array for patches, whose values mean nothing."""
        return recycled(shape, is_shared=True)

    def close(self) -> None:
        """Stop. What has begun comes to an end."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Submitted:
    """What a thread or process gives back, and what is done with it here."""

    def __init__(self, future: Future, take: Callable[[Any], Any] = lambda result: result):
        self._future, self._take = future, take

    def result(self) -> Any:
        try:
            result = self._future.result()
        except BrokenProcessPool as error:
            raise UserError(_STOPPED) from error
        return self._take(result)

    def cancel(self) -> bool:
        return self._future.cancel()

    def wait(self) -> None:
        wait([self._future])


_TASK: list[Any] = []  # of a worker process: the dataset and the processor


def _begin(task: bytes) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _TASK[:] = cloudpickle.loads(task)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _example(number: int) -> Any:
    return _TASK[0][number]


def _write(unread: UnreadImage, location: SharedLocation) -> None:
    _TASK[1].write_patches(unread, opened(location))


def _patches(unread: UnreadImage, shape: tuple[int, int]) -> np.ndarray:
    out = np.empty(shape, np.uint8)
    _TASK[1].write_patches(unread, out)
    return out


def workers_of(dataset: Any, processor: Processor, threads: int, processes: int) -> Workers:
    """Return so many processes, or where there are none so many threads."""
    return Processes(dataset, processor, processes) if processes else Threads(dataset, processor, threads)

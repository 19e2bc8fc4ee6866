"""Batches prepared ahead in a thread, whose end waits for nobody in the wrong place.

Grain's iterator closes itself when it is collected, and waits there for its thread. The garbage collector runs in
whichever thread makes an object: often in one that reads an example for that very thread, and then both wait for ever.
So an iterator that nobody closed is closed in a thread that does nothing else.
"""

from __future__ import annotations

import functools
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Self

import grain

from jvlm.data.packing import PackedSequences

_LEFT: queue.SimpleQueue[grain.DatasetIterator] = queue.SimpleQueue()  # to be closed; its put may interrupt itself


class PrefetchedBatches:
    """Batches that are prepared while others are used; each iteration begins anew.

    Args:
      packed: gives the batches.
      ahead: batches that wait; 0 prepares none ahead.
    """

    def __init__(self, packed: grain.IterDataset, ahead: int):
        self._prefetched = grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=ahead)

    def __iter__(self) -> PrefetchIterator:
        return PrefetchIterator(iter(self._prefetched))


class PrefetchIterator(Iterator[PackedSequences]):
    """An iterator of Grain with its position. Close it: else that is done some time after the last use."""

    def __init__(self, inner: grain.DatasetIterator):
        _start_closing()
        self._inner = inner
        # which so outlives this one
        self._left = weakref.finalize(self, _LEFT.put, inner)
        self._left.atexit = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PackedSequences:
        return next(self._inner)

    def get_state(self) -> list[dict[str, Any]]:
        """Return the position behind the last batch that was given out."""
        return self._inner.get_state()

    def set_state(self, state: Sequence[dict[str, Any]]) -> None:
        """Go on from the positions of all processes."""
        self._inner.set_state(state)

    def close(self) -> None:
        """Stop reading, and wait until that has ended."""
        self._left.detach()
        self._inner.close()


@functools.cache
def _start_closing() -> None:
    threading.Thread(target=_close_left, daemon=True, name="jvlm-closing").start()


def _close_left() -> None:
    while True:
        _LEFT.get().close()

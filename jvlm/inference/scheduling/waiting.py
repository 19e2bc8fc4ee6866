"""The order in which waiting requests are admitted."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator

from jvlm.inference.scheduling.sequence import Sequence, Waiting

# Requests that are tried at a time: a small one may pass large ones for which there are no pages.
_TRIED = 8

# (priority, arrival, index, tie, item)
_Entry = tuple[int, int, int, int, Waiting]


class WaitingQueue:
    """First come, first served, within these rules.

    A lower priority number goes first. Requests of different keys take turns. While few requests wait, the one that
    finds the longest prefix in the cache goes first among those of its key. A request that others have passed too
    often goes before all.

    Args:
      prefix_order_below: waiting requests below which prefixes decide.
      max_passed: admissions of later requests that one may see pass.
    """

    def __init__(self, prefix_order_below: int, max_passed: int):
        self.prefix_order_below, self.max_passed = prefix_order_below, max_passed
        self._by_key: dict[str, list[_Entry]] = {}
        self._by_deadline: list[tuple[int, int, Waiting]] = []
        self._served: dict[str, int] = {}  # number of the last admission of each key
        self._length = self._admissions = 0
        self._ties = itertools.count()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Waiting]:
        return (item for heap in self._by_key.values() for *_, item in heap if item.waits)

    def add(self, sequences: list[Sequence], deadline: int | None = None) -> None:
        """Let sequences wait; ``deadline`` is that of an earlier wait."""
        if deadline is None:
            deadline = self._admissions + self._length + self.max_passed
        item, tie = Waiting(sequences, deadline), next(self._ties)
        spec = item.first.spec
        entry = (spec.priority, item.first.arrival, item.first.index, tie, item)
        heapq.heappush(self._by_key.setdefault(spec.key, []), entry)
        heapq.heappush(self._by_deadline, (deadline, tie, item))
        self._length += 1

    def remove(self, item: Waiting, *, admitted: bool) -> None:
        """Let one go that was admitted or aborted."""
        item.waits = False
        self._length -= 1
        key = item.first.spec.key
        if admitted:
            self._admissions += 1
            self._served[key] = self._admissions
        _drop_gone(self._by_key[key])
        if not self._by_key[key]:
            del self._by_key[key]
        _drop_gone(self._by_deadline)

    def candidates(self, prefix_length: Callable[[Sequence], int]) -> list[Waiting]:
        """Return those to try, best first; only one if it has waited too long for others to pass.

        Args:
          prefix_length: tells how much of a sequence is in the cache.
        """
        if self._by_deadline and self._by_deadline[0][0] <= self._admissions:
            return [self._by_deadline[0][-1]]

        def by_prefix(entry: _Entry) -> tuple[int, int, int]:
            return entry[0], -prefix_length(entry[-1].first), entry[1]

        few, lists = self._length < self.prefix_order_below, []
        for key in sorted(self._by_key, key=lambda key: (self._by_key[key][0][0], self._served.get(key, 0))):
            present = (entry for entry in self._by_key[key] if entry[-1].waits)
            lists.append(heapq.nsmallest(_TRIED, present, key=by_prefix if few else None))
            if len(lists) == _TRIED:
                break
        turns = itertools.zip_longest(*lists)
        entries = [entry for turn in turns for entry in turn if entry is not None][: 2 * _TRIED]
        # turns are among requests of one priority; the sort is stable
        return [entry[-1] for entry in sorted(entries, key=lambda entry: entry[0])[:_TRIED]]


def _drop_gone(heap: list) -> None:
    """Remove from the front of a heap what does not wait any more."""
    while heap and not heap[0][-1].waits:
        heapq.heappop(heap)

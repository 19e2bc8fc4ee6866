"""The slots in which sequences decode."""

from __future__ import annotations

import heapq


class Slots:
    """Slots with generations. A slot is given again only when nobody has it and every plan that named it was read.

    Low slots are given first, so that few rows are needed for few sequences.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count))
        self._generation = [0] * count
        self._unread = [0] * count
        self._taken = [False] * count

    @property
    def free(self) -> int:
        """Return how many can be taken."""
        return len(self._free)

    def take(self) -> tuple[int, int]:
        """Return (slot, generation). There must be a free one."""
        slot = heapq.heappop(self._free)
        self._taken[slot] = True
        return slot, self._generation[slot]

    def release(self, slot: int) -> None:
        """Take a slot from its sequence: results that are still to come carry an old generation from now on."""
        self._taken[slot] = False
        self._generation[slot] += 1
        self._free_if_idle(slot)

    def is_current(self, slot: int, generation: int) -> bool:
        """Return whether a result of this tag is for the sequence that has the slot now."""
        return self._taken[slot] and self._generation[slot] == generation

    def planned(self, slot: int) -> None:
        """Count a plan that draws a token in the slot."""
        self._unread[slot] += 1

    def read(self, slot: int) -> None:
        """Count its result as read."""
        self._unread[slot] -= 1
        self._free_if_idle(slot)

    def _free_if_idle(self, slot: int) -> None:
        if not self._taken[slot] and not self._unread[slot]:
            heapq.heappush(self._free, slot)

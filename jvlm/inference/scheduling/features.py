"""The table of the feature pool: which vision tokens of which pictures are on the device."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import numpy as np


@dataclasses.dataclass
class Features:
    """The slots of a picture in the pool.

    Attributes:
      slots: of each vision token, int32.
      users: prompts that need it.
      encoded: whether the encode that fills them was planned.
    """

    slots: np.ndarray
    users: int = 0
    encoded: bool = False


class FeatureTable:
    """Slots of pictures by their key. Pictures that no prompt needs stay until their slots are needed.

    This is the only record of what the pool holds: whoever needs a picture acquires it here, and whoever finds it
    not encoded encodes it.

    Args:
      num_slots: vision tokens of the pool.
      keeps: keep pictures that no prompt needs.
    """

    def __init__(self, num_slots: int, keeps: bool = True):
        self.num_slots, self.keeps = num_slots, keeps
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries: dict[bytes, Features] = {}
        self._unused: OrderedDict[bytes, int] = OrderedDict()  # number of slots by key, oldest first

    @property
    def free(self) -> int:
        """Return how many slots hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Return how many slots hold features that no prompt needs."""
        return sum(self._unused.values())

    @property
    def usage(self) -> float:
        """Return the share of slots that prompts need, 0..1."""
        return 1 - (self.free + self.cached) / self.num_slots if self.num_slots else 0.0

    def __getitem__(self, key: bytes) -> Features:
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def acquire(self, wanted: Mapping[bytes, int]) -> int | None:
        """Hold slots for every picture, each given with its number of vision tokens.

        Returns:
          how many of them are there already; None if there is no room for the others, and then none is held.
        """
        known = [key for key in wanted if key in self._entries]
        need = sum(tokens for key, tokens in wanted.items() if key not in self._entries)
        spare = self.cached - sum(self._unused.get(key, 0) for key in known)
        if need > self.free + spare:
            return None
        for key in known:
            self._entries[key].users += 1
            self._unused.pop(key, None)
        for key, tokens in wanted.items():
            if key in self._entries:
                continue
            while len(self._free) < tokens:
                self._drop(next(iter(self._unused)))
            slots = [self._free.pop() for _ in range(tokens)]
            self._entries[key] = Features(np.array(slots, np.int32), users=1)
        return sum(self._entries[key].encoded for key in known)

    def release(self, key: bytes) -> None:
        """Count one user less of a picture."""
        entry = self._entries[key]
        entry.users -= 1
        if entry.users < 0:
            raise ValueError("a picture is released more often than it was acquired")
        if entry.users:
            return
        self._unused[key] = len(entry.slots)
        if not (entry.encoded and self.keeps):
            self._drop(key)

    def lose(self, keys: Iterable[bytes]) -> None:
        """Take note that an encode of pictures failed."""
        for key in keys:
            if key in self._entries:
                self._entries[key].encoded = False
            if key in self._unused:
                self._drop(key)

    def forget(self) -> None:
        """Give up all features: those that prompts need are to be encoded again."""
        for key in list(self._unused):
            self._drop(key)
        for entry in self._entries.values():
            entry.encoded = False

    def _drop(self, key: bytes) -> None:
        del self._unused[key]
        self._free.extend(self._entries.pop(key).slots.tolist())

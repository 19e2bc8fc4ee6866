"""Pictures that were sent once and are named by their hash from then on."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable

from jvlm.rl.rewards.wire import blob_name


class BlobStore:
    """Pictures in memory; those that were not used for the longest time go first.

    Args:
      most_bytes: of all together.
    """

    def __init__(self, most_bytes: int):
        self._most, self._size = most_bytes, 0
        self._blobs: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._lock = threading.Lock()

    def put(self, name: str, content: bytes) -> None:
        """Keep a picture. Raises ValueError where it does not have this name, or is larger than the store."""
        if blob_name(content) != name:
            raise ValueError("the content has another hash")
        if len(content) > self._most:
            raise ValueError(f"{len(content)} bytes are more than the store's {self._most}")
        with self._lock:
            if name not in self._blobs:
                self._blobs[name] = content
                self._size += len(content)
            self._blobs.move_to_end(name)
            while self._size > self._most:
                _, gone = self._blobs.popitem(last=False)
                self._size -= len(gone)

    def __contains__(self, name: str) -> bool:
        return name in self._blobs

    def get(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return those of the pictures that are there."""
        found = {}
        with self._lock:
            for name in names:
                if name in self._blobs:
                    self._blobs.move_to_end(name)
                    found[name] = self._blobs[name]
        return found

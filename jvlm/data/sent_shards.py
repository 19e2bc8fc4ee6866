"""Shards in a folder of an object store: each is sent when it is whole, and its set is whole with the last one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from jvlm.data import stores
from jvlm.data.readers.array_record import SHARD_SUFFIX
from jvlm.errors import UserError

_WRITTEN = stores.COPIES / "written"


class SentShards:
    """A folder of a store to which shards are sent.

    Args:
      output: its address.

    Attributes:
      place: where shards lie on this machine until they are sent.
    """

    def __init__(self, output: str):
        self._output = output.rstrip("/")
        self._folder = stores.at(self._output)
        self.place = _WRITTEN / stores.place_of(self._output).relative_to(stores.COPIES)

    def check(self, begun: Iterable[str]) -> None:
        """Raise UserError if the folder holds shards other than those that an interrupted conversion began to send."""
        with stores.answering(self._output):
            present = {file.name for file in stores.find(f"{self._output}/*{SHARD_SUFFIX}")}
        if present - set(begun):
            raise UserError(f"{self._output} holds shards already; remove them or choose another folder")

    def has(self, name: str, size: int | None) -> bool:
        """Whether a shard of this size is there."""
        if not size:
            return False
        file = self._folder / name
        with stores.answering(str(file)):
            try:
                return stores.stat_of(file).length == size
            except FileNotFoundError:
                return False

    def send(self, path: Path) -> None:
        """Copy a shard to the folder."""
        file = self._folder / path.name
        with stores.answering(str(file)):
            stores.copy(path, file)

    def remove(self, names: Iterable[str]) -> None:
        """Remove shards, where they are."""
        for name in names:
            file = self._folder / name
            with stores.answering(str(file)):
                file.unlink(missing_ok=True)

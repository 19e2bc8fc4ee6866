"""Adapters that come and go while a model serves, in arrays that are there from the beginning."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jvlm.adapters import folders, several
from jvlm.adapters.weights import AdapterWeights
from jvlm.errors import UserError
from jvlm.models.vlm import VLM


class AdapterSlots:
    """Keeps what is in each place, and makes the model that has it.

    Args:
      base: the model without adapters.
      adapters: name -> folder of those that are there at the beginning.
      places: most adapters at once.
      room: which matrices may have adapters, and of which rank.

    Attributes:
      model: with the adapters of now.

    Raises:
      UserError: more adapters than places, or one that there is no room for.
    """

    def __init__(self, base: VLM, adapters: Mapping[str, str], *, places: int, room: several.AdapterRoom):
        if len(adapters) > places:
            raise UserError(f"{len(adapters)} adapters are given and --max_loras is {places}; raise it")
        self._base, self._room = base, room
        self._entries: list[tuple[str, AdapterWeights] | None] = [None] * places
        for number, (name, folder) in enumerate(adapters.items()):
            self._entries[number] = name, folders.read(folder, base.config)
        self.model = several.stacked(base, self._entries, self._room)

    def load(self, name: str, folder: str) -> Callable[[], VLM]:
        """Read an adapter, and return what puts it in a free place and returns the model.

        Raises:
          UserError: no adapter, one that there is no room for, a name that is there already, or no free place.
        """
        names = [entry[0] for entry in self._entries if entry is not None]
        if name in names:
            raise UserError(f"an adapter {name!r} is there already; unload it first")
        if len(names) == len(self._entries):
            raise UserError(f"all {len(names)} places are taken (--max_loras); unload an adapter first")
        entries = list(self._entries)
        entries[entries.index(None)] = name, folders.read(folder, self._base.config)
        return self._with(entries)

    def unload(self, name: str) -> Callable[[], VLM]:
        """Return what empties the place of an adapter and returns the model. Raises UserError for none of this name."""
        if not any(entry is not None and entry[0] == name for entry in self._entries):
            raise UserError(f"there is no adapter {name!r}")
        return self._with([None if entry is not None and entry[0] == name else entry for entry in self._entries])

    def _with(self, entries: list[tuple[str, AdapterWeights] | None]) -> Callable[[], VLM]:
        model = several.stacked(self._base, entries, self._room)

        def take() -> VLM:
            self._entries, self.model = entries, model
            return model

        return take

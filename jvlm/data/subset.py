"""Some of the examples of a source, as a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jvlm.data.errors import Origin

if TYPE_CHECKING:
    from jvlm.data.example_source import ExampleSource


class Subset:
    """Some of the examples of a source, as a source."""

    def __init__(self, source: ExampleSource, indices: Sequence[int]):
        self.source, self.indices = source, np.asarray(indices, np.int64)
        self.files = source.files

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Origin, Any]:
        return self.source[int(self.indices[index])]

    def formats(self) -> list[str]:
        """Return what the whole source's examples are taken for."""
        return self.source.formats()

    def __repr__(self) -> str:  # Grain's checkpoints compare it
        return f"Subset({self.source}, {len(self)})"

    def block_starts(self) -> np.ndarray | None:
        """As of the source, where the indices ascend; what is left of its blocks. None if it has none."""
        return self._left_of(self.source.block_starts())

    def file_starts(self) -> np.ndarray | None:
        """As of the source, likewise."""
        return self._left_of(self.source.file_starts())

    def _left_of(self, starts: np.ndarray | None) -> np.ndarray | None:
        if starts is None or (np.diff(self.indices) < 0).any():
            return None
        return np.unique(np.searchsorted(self.indices, starts))

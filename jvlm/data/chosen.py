"""Examples of a source for `jvlm.data.conversion.write_shards`: all of them, or some."""

from __future__ import annotations

import numpy as np

from jvlm.data.example_source import ExampleSource, Opening, Read


class Chosen:
    """Examples of a source by their place among those chosen. The files are opened again where it is unpickled.

    Args:
      indices: of the examples in the source; None chooses all.
    """

    def __init__(self, source: ExampleSource, indices: np.ndarray | None = None):
        self.source, self.indices = source, indices

    def __reduce__(self):
        return _opened, (self.source.opening, self.indices)

    def __len__(self) -> int:
        return len(self.source) if self.indices is None else len(self.indices)

    def read(self, index: int) -> Read:
        """Return an example."""
        return self.source.read(index if self.indices is None else int(self.indices[index]))

    def formats(self) -> list[str]:
        """Return what the examples are taken for."""
        return self.source.formats()


def _opened(opening: Opening, indices: np.ndarray | None) -> Chosen:
    return Chosen(opening.source(), indices)

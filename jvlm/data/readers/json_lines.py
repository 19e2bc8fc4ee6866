"""JSON lines, as users write them."""

from __future__ import annotations

import codecs
from array import array
from typing import Any

import numpy as np

from jvlm.data.errors import Origin
from jvlm.data.readers import file_kinds
from jvlm.data.readers.reader import parse_json
from jvlm.units import MIB

_MANY = 10_000_000  # lines


class JsonLines:
    """Holds the offset of each line; reads one when asked: the file is never in memory. Blank lines are no examples."""

    def __init__(self, path: str):
        file_kinds.check_lines(path)
        self.path = path
        offsets, at = array("q"), 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    offsets.extend((at, len(line), number))
                at += len(line)
        self._offsets = np.asarray(offsets).reshape(-1, 3)

    def note(self) -> str | None:
        """Return what there is to know about very many lines."""
        if len(self) <= _MANY:
            return None
        mib = self._offsets.nbytes / MIB
        return (
            f"{self.path}: where its {len(self):,} lines begin takes {mib:,.0f} MiB of each process; shards of "
            "jvlm data convert take none"
        )

    def __len__(self) -> int:
        return len(self._offsets)

    def number(self, index: int) -> int:
        """Return the number of the example's line, as an editor counts: from 1, blank lines included."""
        return int(self._offsets[index, 2])

    def read(self, index: int, origin: Origin) -> Any:
        start, size, _ = self._offsets[index]
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(size)
        cut = "" if line.endswith(b"\n") else "; the file ends without a newline, so it may be cut short"
        return parse_json(line, origin, "Each line must be one JSON object", cut)

"""What a compiled step sends, as a checked-in file for each experiment and topology: a change shows as a diff."""

from __future__ import annotations

import difflib
from pathlib import Path

from .chips import Topology
from .measure import Compiled


def text(compiled: Compiled) -> str:
    """Return the mesh, then a line for each kind of collective and mesh axes: instructions, bytes of a chip's step."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in compiled.mesh.items())
    lines = sorted(line for one in compiled.axis_traffic for line in one.listing)
    return "\n".join([mesh, *(f"  {line}" for line in lines)]) + "\n"


def path_of(folder: Path, experiment: str, topology: Topology) -> Path:
    """Where the file of an experiment on a topology lies."""
    return folder / f"{experiment}.{topology.name.replace(':', '-').replace('*', '-times-')}.txt"


def difference(path: Path, compiled: Compiled) -> str:
    """Return a diff from what is written down to what was compiled; empty where they agree."""
    written = path.read_text() if path.is_file() else ""
    lines = difflib.unified_diff(
        written.splitlines(True), text(compiled).splitlines(True), str(path) if written else "nothing", "compiled"
    )
    return "".join(lines)

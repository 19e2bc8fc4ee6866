"""The collectives of a compiled program: their kinds, how many there are, and over which mesh axes they run."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_CALL = re.compile(rf"= .*? ({'|'.join(KINDS)})(?:-start)?\(")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


def listing(program: str, mesh: Mesh) -> list[str]:
    """Return sorted lines "kind over axes: count" for a compiled program's text. A collective in a loop counts once.

    Raises:
      ValueError: a collective over devices that no set of mesh axes joins.
    """
    counts: Counter[str] = Counter()
    for line in program.splitlines():
        call = _CALL.search(line)
        if call:
            counts[f"{call[1]} over {axes(groups(line), mesh, whole='source_target_pairs=' not in line)}"] += 1
    return [f"{name}: {count}" for name, count in sorted(counts.items())]


def axes(groups: Int[np.ndarray, "g d"] | None, mesh: Mesh, *, whole: bool) -> str:
    """Return the mesh axes along which the devices of each group lie, as "fsdp context"; "none" for single devices.

    Args:
      groups: [groups, devices of a group], as indices of devices in the mesh; None is one group of all devices.
      whole: each group must be all devices along the axes; pairs of a permutation, and parts of an axis, are not.

    Raises:
      ValueError: no set of axes joins these devices.
    """
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    if groups is None:
        return " ".join(sizes)
    grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    coordinates = np.stack(np.unravel_index(groups, grid.shape))
    differ = (coordinates != coordinates[..., :1]).any(axis=(1, 2))
    chosen = [axis for axis in range(len(sizes)) if differ[axis]]
    joined = " ".join(itertools.compress(sizes, differ)) or "none"
    others = [axis for axis in range(len(sizes)) if axis not in chosen]
    size = math.prod(grid.shape[axis] for axis in chosen)
    expected = grid.transpose(*others, *chosen).reshape(-1, size)
    if not whole or {frozenset(group) for group in groups.tolist()} == {frozenset(g) for g in expected.tolist()}:
        return joined
    if len(chosen) == 1:  # devices that hold the same slice of what the axis does not divide
        return f"part of {joined}"
    shown = sorted(map(sorted, groups.tolist()))
    raise ValueError(f"no axes of {dict(mesh.shape)} join these devices: {shown}")


def groups(line: str) -> Int[np.ndarray, "g d"] | None:
    """Return the devices of each group, or pair, of an instruction; None for one group of all devices.

    Raises:
      ValueError: a way of writing them that is not known.
    """
    if named := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        devices = _iota(named[2] or str(math.prod(sizes.values())), named[3]).reshape(tuple(sizes.values()))
        chosen = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", named[4])]
        others = [axis for axis in range(len(sizes)) if axis not in chosen]
        return devices.transpose(*others, *chosen).reshape(-1, math.prod(devices.shape[axis] for axis in chosen))
    if iota := _IOTA.search(line):
        shape = [int(n) for n in iota[1].split(",")]
        return _iota(iota[2], iota[3]).reshape(shape[0], -1)
    if listed := _PAIRS.search(line) or _LISTED.search(line):
        return np.array([[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d, ]*)\}", listed[1])])
    if "replica_groups={}" in line:
        return None
    raise ValueError(f"cannot read which devices take part in: {line.strip()[:500]}")


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Return device numbers counted through a shape whose dimensions are then reordered."""
    lengths = [int(n) for n in shape.split(",")]
    counted = np.arange(math.prod(lengths)).reshape(lengths)
    return counted.transpose([int(n) for n in order.split(",")]) if order else counted

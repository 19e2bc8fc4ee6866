"""What a compiled program sends between devices: kinds of collectives, how many, and over which mesh axes."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

import numpy as np
from jax.sharding import Mesh

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_CALL = re.compile(rf"= .*? ({'|'.join(_KINDS)})(?:-start)?\(")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
    r"\{('axis_\d+'(?:,'axis_\d+')*)\}"
)
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


def listing(program: str, mesh: Mesh) -> list[str]:
    """Lines "kind over axes: count" of a compiled program's text, sorted. A collective in a loop counts once.

    Raises:
      ValueError: a collective over devices that no set of mesh axes joins.
    """
    counts: Counter[str] = Counter()
    for line in program.splitlines():
        call = _CALL.search(line)
        if call:
            counts[f"{call[1]} over {_axes(line, mesh)}"] += 1
    return [f"{name}: {count}" for name, count in sorted(counts.items())]


def _axes(line: str, mesh: Mesh) -> str:
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    # a compiled program numbers devices by their place in the mesh
    places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    pairs = _PAIRS.search(line)
    if pairs:
        moved = np.asarray(_groups(pairs[1]))
        differ = np.stack(np.unravel_index(moved[:, 0], places.shape)) != np.stack(
            np.unravel_index(moved[:, 1], places.shape)
        )
        return " ".join(axis for axis, any_differ in zip(sizes, differ.any(1), strict=True) if any_differ) or "none"
    found = _replica_groups(line)
    if not found:  # written as {}: all devices together
        return " ".join(sizes)
    groups = {frozenset(group) for group in found}
    for count in range(len(sizes) + 1):
        for chosen in itertools.combinations(range(len(sizes)), count):
            kept = [axis for axis in range(len(sizes)) if axis not in chosen]
            size = math.prod(places.shape[axis] for axis in chosen)
            expected = places.transpose(*kept, *chosen).reshape(-1, size)
            if groups == {frozenset(group) for group in expected.tolist()}:
                return " ".join(list(sizes)[axis] for axis in chosen) or "none"
    raise ValueError(f"no axes of {dict(mesh.shape)} join these devices: {sorted(map(sorted, groups))}")


def _replica_groups(line: str) -> list[list[int]]:
    """In the three ways XLA writes them; [] for all devices. Raises ValueError for a fourth."""
    named = _MESH.search(line)
    if named:
        sizes = dict(re.findall(r"'(axis_\d+)'=(\d+)", named[1]))
        shape = [int(size) for size in sizes.values()]
        devices = _iota(named[2] or str(math.prod(shape)), named[3]).reshape(shape)
        chosen = [list(sizes).index(axis) for axis in re.findall(r"axis_\d+", named[4])]
        kept = [axis for axis in range(len(shape)) if axis not in chosen]
        return devices.transpose(*kept, *chosen).reshape(-1, math.prod(shape[axis] for axis in chosen)).tolist()
    iota = _IOTA.search(line)
    if iota:
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2])).tolist()
    listed = _LISTED.search(line)
    if listed or "replica_groups={}" in line:
        return _groups(listed[1]) if listed else []
    raise ValueError(f"cannot read which devices take part in: {line.strip()}")


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Numbers of devices counted through a shape, its dimensions then reordered."""
    lengths = [int(n) for n in shape.split(",")]
    counted = np.arange(math.prod(lengths)).reshape(lengths)
    return counted.transpose([int(n) for n in order.split(",")]) if order else counted


def _groups(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d,]*)\}", text)]

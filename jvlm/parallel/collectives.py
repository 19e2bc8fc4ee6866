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
    if found is None or not found:
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


def _replica_groups(line: str) -> list[list[int]] | None:
    iota = _IOTA.search(line)
    if iota:
        shape = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else list(range(len(shape)))
        return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(int(iota[1]), int(iota[2])).tolist()
    listed = _LISTED.search(line)
    return _groups(listed[1]) if listed else None


def _groups(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d,]*)\}", text)]

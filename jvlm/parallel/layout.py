"""A mesh and a rules table together: where every array of a run lives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvlm.errors import UserError
from jvlm.models import batch as batches
from jvlm.models.batch import PackedBatch
from jvlm.parallel import rules
from jvlm.parallel.mesh import ParallelConfig, make_mesh

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Layout:
    """Gives shardings. ``largest_whole`` is in MiB, as in `ParallelConfig`."""

    mesh: Mesh
    rules: rules.Rules
    largest_whole: float = ParallelConfig.largest_whole

    @classmethod
    def of(cls, config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
        """The layout of a configuration over devices (None: all)."""
        table = rules.table(config.rules, config.override)
        return cls(make_mesh(config, devices), table, config.largest_whole)

    def size(self, axes: Sequence[str]) -> int:
        """Number of parts that mesh axes cut an array into."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def splits(self, axis: str | None) -> tuple[str, ...]:
        """Mesh axes of more than one device that split a logical axis.

        Raises:
          KeyError: an axis that the table has no line for.
        """
        if axis is None:
            return ()
        if axis not in self.rules:
            raise KeyError(f"no rule for the axis {axis!r}; add a line to jvlm/parallel/rules.py")
        return tuple(a for a in self.rules[axis] if self.mesh.shape[a] > 1)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """How an array is split. Dimensions before those of ``axes`` (stacks of layers) are not.

        A mesh axis splits none that it does not divide, and of those that ask for it the one whose line in the table
        comes first.
        """
        used: set[str] = set()
        first = len(shape) - len(axes)
        parts: list[tuple[str, ...]] = [()] * len(shape)
        splits, lines = [self.splits(axis) for axis in axes], list(self.rules)
        for i in sorted(range(len(axes)), key=lambda i: lines.index(axes[i]) if axes[i] else -1):
            chosen: tuple[str, ...] = ()
            for name in splits[i]:
                if name not in used and shape[first + i] % self.size((*chosen, name)) == 0:
                    chosen += (name,)
            used.update(chosen)
            parts[first + i] = chosen
        return PartitionSpec(*(part if len(part) > 1 else part[0] if part else None for part in parts))

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """As `spec`, on the mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def whole(self) -> NamedSharding:
        """Every device holds all of it."""
        return NamedSharding(self.mesh, PartitionSpec())

    def parameter(self, path: str, variable: nnx.Variable) -> NamedSharding:
        """Where a parameter lives. Fits `jvlm.weights.io.load`.

        Raises:
          UserError: a parameter above ``largest_whole`` that no rule splits on a mesh that splits others, or whose
            axes have no rule.
        """
        axes, value = variable.get_metadata()["axes"], variable.get_value()
        try:
            sharding = self.sharding(axes, value.shape)
        except KeyError as error:
            raise UserError(f"parameter {path} {value.shape}: {error.args[0]}") from None
        size = math.prod(value.shape) * value.dtype.itemsize / MIB
        if sharding.is_fully_replicated and size > self.largest_whole and self._stores_parts():
            lines = {a: "+".join(self.rules[a]) or "nothing" for a in axes}
            raise UserError(
                f"parameter {path} {tuple(value.shape)} of {size:.1f} MiB would stay whole on each of "
                f"{self.mesh.size} devices: its axes {lines} do not divide by the mesh {dict(self.mesh.shape)}; choose "
                f"others or parallel.override, or raise parallel.largest_whole = {self.largest_whole}"
            )
        return sharding

    def _stores_parts(self) -> bool:
        activations = {"batch", "sequence", "patches", "vision_tokens"}
        return any(self.splits(axis) for axis in self.rules if axis not in activations)

    def parameters(self, variables: Mapping[str, nnx.Variable]) -> dict[str, NamedSharding]:
        """`parameter` for each path."""
        return {path: self.parameter(path, variable) for path, variable in variables.items()}

    def optimizer(self, state: Any, variables: Mapping[str, nnx.Variable]) -> Any:
        """Shardings for the (abstract) state of an optimizer of path -> parameter.

        A state of a parameter's shape lives where the parameter does. A factored one keeps the axes of the dimensions
        it has left. What belongs to no parameter is whole.
        """

        def place(keys, leaf) -> NamedSharding:
            path = next((key.key for key in reversed(keys) if getattr(key, "key", None) in variables), None)
            if path is None or not leaf.shape:
                return self.whole()
            variable = variables[path]
            axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
            axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
            return self.sharding(_kept(axes, shape, leaf.shape), leaf.shape)

        return jax.tree_util.tree_map_with_path(place, state)

    def batch(self, batch: PackedBatch) -> PackedBatch:
        """Shardings of a (possibly abstract) batch; axes before those of a row's batch are not split.

        Raises:
          UserError: rows, tokens or patches that the mesh does not divide.
        """
        found = {}
        for field in dataclasses.fields(batch):
            value = getattr(batch, field.name)
            if field.metadata.get("static"):
                found[field.name] = value
                continue
            axes = batches.axes(field.name)
            first = batch.tokens.ndim - 2
            spec: list[Any] = [None] * first
            for axis, length in zip(axes, value.shape[first:], strict=False):
                names = self.splits(axis)
                if length % self.size(names):
                    raise UserError(
                        f"batch.{field.name} has {length} {axis}, which {' x '.join(names)} = {self.size(names)} does "
                        "not divide; change data.batch_size, data.seq_len, data.max_patches or the mesh"
                    )
                spec.append(names if names else None)
            found[field.name] = NamedSharding(self.mesh, PartitionSpec(*spec))
        return PackedBatch(**found)


def _kept(axes: Sequence[str | None], shape: Sequence[int], left: Sequence[int]) -> list[str | None]:
    """Axes of the dimensions of ``shape`` that ``left`` still has, in order; None where one has no counterpart."""
    found: list[str | None] = []
    begin = 0
    for length in left:
        at = next((i for i in range(begin, len(shape)) if shape[i] == length), None)
        found.append(None if at is None else axes[at])
        begin = begin if at is None else at + 1
    return found

"""A mesh and a table of rules: how every array of a run is sharded."""

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
class MeshLayout:
    """A mesh and the rules that map logical axes to its axes. Hashable.

    Attributes:
      max_replicated_mib, ring_attention: as in `ParallelConfig`.
    """

    mesh: Mesh
    rules: rules.Rules
    max_replicated_mib: float = ParallelConfig.max_replicated_mib
    ring_attention: bool = ParallelConfig.ring_attention

    @classmethod
    def of(cls, config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> MeshLayout:
        """Return the layout of a configuration over devices (None: all)."""
        table = rules.table(config.rules, config.override)
        return cls(make_mesh(config, devices), table, config.max_replicated_mib, config.ring_attention)

    def num_shards(self, axes: Sequence[str]) -> int:
        """Return the number of shards that mesh axes split a dimension into."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """Return the mesh axes, of more than one device, that split a logical axis.

        Raises:
          KeyError: an axis that the rules do not have.
        """
        if axis is None:
            return ()
        if axis not in self.rules:
            raise KeyError(f"no rule for the axis {axis!r}; add a line to jvlm/parallel/rules.py")
        return tuple(a for a in self.rules[axis] if self.mesh.shape[a] > 1)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """Return how an array is split. Dimensions before those of ``axes`` (stacks of layers) are not.

        A mesh axis splits no dimension that it does not divide; of several, it splits the one whose rule comes first.
        """
        used: set[str] = set()
        first = len(shape) - len(axes)
        entries: list[tuple[str, ...]] = [()] * len(shape)
        wanted, precedence = [self.mesh_axes(axis) for axis in axes], list(self.rules)
        for i in sorted(range(len(axes)), key=lambda i: precedence.index(axes[i]) if axes[i] else -1):
            chosen: tuple[str, ...] = ()
            for name in wanted[i]:
                if name not in used and shape[first + i] % self.num_shards((*chosen, name)) == 0:
                    chosen += (name,)
            used.update(chosen)
            entries[first + i] = chosen
        return PartitionSpec(*(entry if len(entry) > 1 else entry[0] if entry else None for entry in entries))

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """Return `spec` on the mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def replicated(self) -> NamedSharding:
        """Return the sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def parameter(self, path: str, variable: nnx.Variable) -> NamedSharding:
        """Return the sharding of a parameter. Can be given to `jvlm.load`.

        Raises:
          UserError: a parameter above ``max_replicated_mib`` that no rule splits on a mesh that splits others, or
            whose axes have no rule.
        """
        axes, value = variable.get_metadata()["axes"], variable.get_value()
        try:
            sharding = self.sharding(axes, value.shape)
        except KeyError as error:
            raise UserError(f"parameter {path} {value.shape}: {error.args[0]}") from None
        size = math.prod(value.shape) * value.dtype.itemsize / MIB
        too_large = size > self.max_replicated_mib and "rank" not in axes  # adapters are small beside their matrix
        if sharding.is_fully_replicated and too_large and self._splits_parameters():
            lines = {a: "+".join(self.rules[a]) or "nothing" for a in axes}
            raise UserError(
                f"parameter {path} {tuple(value.shape)} of {size:.1f} MiB would be replicated on each of "
                f"{self.mesh.size} devices: its axes {lines} do not divide by the mesh {dict(self.mesh.shape)}; choose "
                f"others or parallel.override, or raise parallel.max_replicated_mib = {self.max_replicated_mib}"
            )
        return sharding

    def _splits_parameters(self) -> bool:
        activations = {"batch", "sequence", "patches", "vision_tokens"}
        return any(self.mesh_axes(axis) for axis in self.rules if axis not in activations)

    def parameters(self, variables: Mapping[str, nnx.Variable]) -> dict[str, NamedSharding]:
        """Return `parameter` for each path."""
        return {path: self.parameter(path, variable) for path, variable in variables.items()}

    def optimizer(self, state: Any, variables: Mapping[str, nnx.Variable]) -> Any:
        """Return shardings for the (abstract) state of an optimizer of path -> parameter.

        A state of a parameter's shape is sharded as the parameter. A factored one is sharded as the dimensions that it
        has left. What belongs to no parameter is replicated.
        """

        def sharding_of(keys, leaf) -> NamedSharding:
            path = next((key.key for key in reversed(keys) if getattr(key, "key", None) in variables), None)
            if path is None or not leaf.shape:
                return self.replicated()
            variable = variables[path]
            axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
            axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
            return self.sharding(_axes_left(axes, shape, leaf.shape), leaf.shape)

        return jax.tree_util.tree_map_with_path(sharding_of, state)

    def batch(self, batch: PackedBatch) -> PackedBatch:
        """Return shardings of a (possibly abstract) batch; axes before those of a `PackedBatch` are not split.

        Raises:
          UserError: sequences, tokens or patches that the mesh does not divide.
        """
        shardings = {}
        for field in dataclasses.fields(batch):
            value = getattr(batch, field.name)
            if field.metadata.get("static"):
                shardings[field.name] = value
                continue
            axes = batches.axes(field.name)
            first = batch.tokens.ndim - 2
            spec: list[Any] = [None] * first
            for axis, length in zip(axes, value.shape[first:], strict=False):
                names = self.mesh_axes(axis)
                if length % self.num_shards(names):
                    by = f"{' x '.join(names)} = {self.num_shards(names)}"
                    raise UserError(
                        f"batch.{field.name} has {length} {axis}, which {by} does not divide; "
                        "change data.batch_size, data.seq_len, data.max_patches or the mesh"
                    )
                spec.append(names if names else None)
            shardings[field.name] = NamedSharding(self.mesh, PartitionSpec(*spec))
        return PackedBatch(**shardings)


def _axes_left(axes: Sequence[str | None], shape: Sequence[int], left: Sequence[int]) -> list[str | None]:
    """Return the axes of the dimensions of ``shape`` that ``left`` still has, in order; None for other dimensions.

    With as many dimensions, some are shorter: blocks of values stand for them, and are split as the values are.
    """
    if len(left) == len(shape):
        return list(axes)
    result: list[str | None] = []
    begin = 0
    for length in left:
        at = next((i for i in range(begin, len(shape)) if shape[i] == length), None)
        result.append(None if at is None else axes[at])
        begin = begin if at is None else at + 1
    return result

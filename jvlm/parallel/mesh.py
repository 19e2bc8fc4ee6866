"""The mesh: devices in at most five axes, the slow network outermost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jvlm.errors import UserError
from jvlm.parallel.rules import AXES
from jvlm.validation import check_fields


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes and the rules that map arrays to them.

    ``*_slices`` are for TPU multi-slice. On GPU clusters the outermost axes span machines without a setting.

    Attributes:
      data: devices with equal parameters and different sequences. -1 is the number of devices that the others leave.
      fsdp: devices with different sequences that store shards of the parameters and gather each where it is used.
      tensor: devices that split heads, hidden units of MLPs and the vocabulary.
      context: devices that split the tokens and the patches of a sequence.
      expert: devices that split the experts; they have different sequences too.
      data_slices: how many of ``data`` cross the slow network between slices; None takes all slices. The product with
        fsdp_slices is the number of slices.
      fsdp_slices: how many of ``fsdp`` cross the slow network between slices.
      rules: name of the table from logical axes to mesh axes (jvlm.parallel.rules).
      override: rules that replace some of the table, as "heads=" or "embed=fsdp+context".
      ring_attention: with ``context``, keys and values travel from device to device, a shard at a time and no further
        than segments reach, while those that are there are attended to; otherwise each device gathers all of them.
      max_replicated_mib: on a mesh that splits parameters, a parameter of more MiB that stays replicated is an error.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    data_slices: int | None = None
    fsdp_slices: int = 1
    rules: str = "standard"
    override: tuple[str, ...] = ()
    ring_attention: bool = False
    max_replicated_mib: float = 4.0

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in AXES}
        slices = dict.fromkeys(("data_slices", "fsdp_slices"), "[1, inf)")
        check_fields(
            self, "parallel.", {**dict.fromkeys(AXES, "[-1, inf)"), **slices, "max_replicated_mib": "[0, inf)"}
        )
        for name, size in sizes.items():
            if size == 0:
                raise UserError(f"parallel.{name} must be positive, or -1 for the rest, got {size}")
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"only one axis can be -1, the rest; got {sizes}")

    def sizes(self, devices: int) -> dict[str, int]:
        """Return the size of each axis on so many devices. Raises UserError where their product is another number."""
        sizes = {name: getattr(self, name) for name in AXES}
        rest = [name for name, size in sizes.items() if size == -1]
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if rest and devices % fixed == 0:
            sizes[rest[0]] = devices // fixed
        if math.prod(sizes.values()) != devices:
            shown = " x ".join(f"{name} {getattr(self, name)}" for name in AXES)
            raise UserError(f"a mesh of {shown} does not fit {devices} devices; set parallel.* so that it does")
        return sizes


def make_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of a configuration over devices (None: all), which may be those of a described topology.

    Raises:
      UserError: sizes that do not fit the devices, or the slices.
    """
    grid = arrange(config, list(jax.devices() if devices is None else devices))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(config: ParallelConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """Return the devices as an array with the axes of the mesh.

    Neighbours on ``tensor`` and ``context``, which talk most, are neighbours in the network of the chips.
    """
    sizes = config.sizes(len(devices))
    # JAX calls each machine of GPUs a slice; there, an axis may cross machines without being asked to
    slices = 1 if devices[0].platform == "gpu" else len({getattr(d, "slice_index", 0) for d in devices})
    across = {"data": slices // config.fsdp_slices if config.data_slices is None else config.data_slices}
    across["fsdp"] = config.fsdp_slices
    if math.prod(across.values()) != slices:
        raise UserError(
            f"parallel.data_slices {across['data']} x parallel.fsdp_slices {across['fsdp']} are not the {slices} "
            "slice(s) that the devices are in"
        )
    for name, count in across.items():
        if sizes[name] % count:
            raise UserError(f"parallel.{name} = {sizes[name]} is no multiple of the {count} slices it crosses")
    outer = tuple(across.get(name, 1) for name in AXES)
    inner = tuple(sizes[name] // count for name, count in zip(AXES, outer, strict=True))
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    # in the order of processes: the sequences of a host are side by side, and the last axes stay within it
    return np.asarray(devices).reshape(inner)

"""Which devices share a generating model, and where its parameters and prompts live on them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jvlm.errors import UserError
from jvlm.inference.sampling import SamplingArrays
from jvlm.models import vlm
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import TOWERS, VLM, VLMConfig
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig

RULES = "serving"


def default_mesh(config: VLMConfig, devices: int) -> ParallelConfig:
    """Return the mesh of a number of devices when none is asked for: heads over as many as divide them, sequences over
    the rest.

    No key head is then stored twice. A ``tensor`` axis larger than the number of key heads stores some of them more
    than once, for parameters that fit no other way; it has to be asked for.
    """
    sizes = [size for size in range(1, devices + 1) if devices % size == 0 and not _problem(config, size)]
    own = [size for size in sizes if all(count % size == 0 for _, count in _heads(config))]
    return ParallelConfig(data=-1, tensor=max(own), rules=RULES)


def inference_layout(
    config: VLMConfig, asked: ParallelConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> MeshLayout | None:
    """Return the layout of a model over devices (None: all), or None for one device.

    Args:
      asked: the mesh; `default_mesh` without one.
    """
    devices = jax.devices() if devices is None else devices
    layout = MeshLayout.of(asked or default_mesh(config, len(devices)), devices)
    return check_layout(layout, config)


def check_layout(layout: MeshLayout | None, config: VLMConfig) -> MeshLayout | None:
    """Return the layout if it can generate with a model; None for one device.

    Raises:
      UserError: a mesh axis that nothing would use, or heads that do not divide.
    """
    if layout is None or layout.mesh.size == 1:
        return None
    split = {axis for axis in ("sequence", "patches", "vision_tokens") if layout.mesh_axes(axis)}
    used = {name for axes in layout.rules.values() for name in axes}
    idle = [name for name, size in layout.mesh.shape.items() if size > 1 and name not in used]
    if split or idle:
        names = idle or sorted({name for axis in split for name in layout.mesh_axes(axis)})
        raise UserError(
            f"parallel.{names[0]} = {layout.mesh.shape[names[0]]}: a decoding step has one token of each sequence, so "
            f"tokens and patches are not split; give these devices to data or tensor, with parallel.rules {RULES}"
        )
    problem = _problem(config, layout.num_shards(layout.mesh_axes("heads")))
    if problem:
        raise UserError(problem)
    return layout


def shard_params(model: VLM, layout: MeshLayout) -> VLM:
    """Return the model with its parameters sharded for generation; those that are so already are not copied.

    Raises:
      UserError: devices of other processes: generation has one.
    """
    if layout.mesh.is_multi_process:
        processes = {device.process_index for device in layout.mesh.devices.flat}
        raise UserError(f"generation runs in one process; this mesh has devices of {len(processes)}")
    variables = vlm.variables(model)
    values = {path: jax.device_put(v.get_value(), layout.parameter(path, v)) for path, v in variables.items()}
    return vlm.bind(model, values)


def local_copy(model: VLM, layout: MeshLayout | None, device: jax.Device) -> VLM:
    """Return a model of several processes with a copy of its parameters on the devices of this one.

    One parameter after the other, so that no more than one is there whole. A model of this process alone is returned as
    it is. Every process must call it.

    Args:
      layout: of the copy; None is ``device`` alone.
    """
    variables = vlm.variables(model)
    if all(v.get_value().is_fully_addressable for v in variables.values()):
        return model
    values = {}
    for path, variable in variables.items():
        value = variable.get_value()
        whole = _replicate(value.sharding.mesh)(value).addressable_data(0)
        place = device if layout is None else layout.parameter(path, variable)
        values[path] = jax.device_put(whole, place)
    return vlm.bind(model, values)


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def shard_batch(
    layout: MeshLayout, batch: PackedBatch, lengths: Int[np.ndarray, " B"], arrays: SamplingArrays
) -> tuple[PackedBatch, Int[Array, " B"], SamplingArrays]:
    """Return prompts on the devices of their sequences."""
    shardings = sampling_shardings(layout, arrays)
    values = (batch, lengths, arrays)
    return jax.device_put(values, (layout.batch(batch), shardings.request_ids, shardings))


def sampling_shardings(layout: MeshLayout, arrays: SamplingArrays) -> SamplingArrays:
    """Return the shardings of sampling arrays: request ids over the batch axis, the others replicated."""
    whole = jax.tree.map(lambda _: layout.replicated(), arrays)
    return dataclasses.replace(whole, request_ids=layout.sharding(("batch",), arrays.request_ids.shape))


def _heads(config: VLMConfig) -> list[tuple[str, int]]:
    """Every number of heads in a model, with the name of its field."""
    parts = {name: getattr(config, name) for name in TOWERS}
    fields = ("num_heads", "num_kv_heads")
    return [(f"{name}.{f}", getattr(part, f)) for name, part in parts.items() for f in fields if hasattr(part, f)]


def _problem(config: VLMConfig, parts: int) -> str | None:
    """Why heads cannot be split into so many parts; key heads may also be repeated."""
    for name, count in _heads(config):
        if count % parts and not (name.endswith("kv_heads") and parts % count == 0):
            return f"model.{name} = {count} and tensor = {parts} do not divide; choose another parallel.tensor"
    return None

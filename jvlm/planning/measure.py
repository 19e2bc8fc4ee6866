"""Compile a step for chips that are not there, and measure what came out."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from jvlm_kernels.platforms import compiling_for

from jvlm.adapters.layers import is_adapter_path
from jvlm.errors import UserError
from jvlm.parallel.collectives import axes as axes_of
from jvlm.training import compiled_step
from jvlm.training.config import Experiment

from . import compilers, gpus, hlo
from .chips import Topology

GIGA = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
GPU_SHARE = 0.75  # of a GPU's memory is what JAX takes for its programs, unless `GPU_SHARE_VARIABLE` says another
GPU_SHARE_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on each chip.

    Attributes:
      parameters: of the base, quantised ones in the form that they are stored in.
      adapters: parameters of adapters.
      optimizer: its state: that of what is trained.
      activations: kept by the forward pass for the backward one, for all layers; 0 where a program does not say.
      temporary: everything else that comes and goes: gradients, gathered weights, a layer's own, at their highest.
    """

    parameters: float = 0.0
    adapters: float = 0.0
    optimizer: float = 0.0
    cache: float = 0.0
    batch: float = 0.0
    activations: float = 0.0
    temporary: float = 0.0
    code: float = 0.0

    @property
    def peak(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class AxisTraffic:
    """What each chip sends over one set of mesh axes in a step, by kind of collective.

    Attributes:
      kinds: bytes in a step.
      counts: instructions in the program.
      bandwidth: bytes a second that a chip can send to its partners, all links towards them together.
      network: "ici" within a slice of TPUs, "nvlink" within a machine of GPUs, "dcn" between those.
    """

    axes: str
    kinds: Mapping[str, float]
    counts: Mapping[str, int]
    bandwidth: float
    network: str

    @property
    def bytes(self) -> float:
        return sum(self.kinds.values())

    @property
    def listing(self) -> list[str]:
        """A line for each kind, as files under tests/parallel/collectives have them."""
        kinds = sorted(self.kinds)
        return [f"{k} over {self.axes}: {self.counts[k]}, {self.kinds[k] / 1e9:.2f} GB" for k in kinds]

    @property
    def seconds(self) -> float:
        return self.bytes / self.bandwidth


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that was compiled for a topology, or did not fit: then without traffic. All figures are of a chip.

    Attributes:
      limit: bytes of HBM that a program may use.
      flops, hbm: see `hlo.Traffic`.
      seconds: to lower, compile and read it.
      compiler: see `compilers.describe`.
      unread: why the program's text could not be had, so that its memory is known and its traffic is not; else empty.
    """

    mesh: Mapping[str, int]
    memory: Memory
    fits: bool
    limit: float
    flops: float
    hbm: float
    axis_traffic: tuple[AxisTraffic, ...]
    seconds: float
    compiler: str = ""
    unread: str = ""

    @property
    def readable(self) -> bool:
        """Whether it fits and its traffic is known."""
        return self.fits and not self.unread


def devices_of(topology: Topology) -> Sequence[jax.Device]:
    """Return described devices. Raises UserError for a topology that the compiler does not know."""
    if topology.switched:
        return gpus.devices(topology.generation, *topology.shape)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chips == 1:  # a machine of one chip; the compiler takes four for granted
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.slice_name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {topology.name}: {str(error).splitlines()[0]}") from None
    return described.devices


def compile_step(experiment: Experiment, topology: Topology) -> Compiled:
    """Return the training step of an experiment, exactly as the trainer would run it on that topology.

    Raises:
      UserError: a mesh that does not fit the topology, rows or parameters.
    """
    planned = compiled_step.compile_step(experiment, devices_of(topology))
    params = planned.state.params
    return measure(
        planned.lower,
        planned.layout.mesh,
        topology,
        parameters=bytes_of({path: value for path, value in params.items() if not is_adapter_path(path)}),
        adapters=bytes_of({path: value for path, value in params.items() if is_adapter_path(path)}),
        optimizer=bytes_of(planned.state.opt_state),
        batch=bytes_of(planned.batches),
        branch_frequency=experiment.model.encoder.branch_frequency(),
    )


def measure(
    lower: Callable[[], jax.stages.Lowered],
    mesh: Mesh,
    topology: Topology,
    *,
    branch_frequency: Mapping[str, float] = MappingProxyType({}),
    new_results: Mapping[str, float] = MappingProxyType({}),
    resident: float = 0.0,
    **sizes: float,
) -> Compiled:
    """Compile what ``lower()`` lowers.

    Args:
      branch_frequency: see `hlo.read`.
      new_results: parts of its results that are no arguments again, in bytes of a device.
      resident: bytes of ``sizes`` that are no arguments of it, but in memory all the same.
      sizes: the parts of its arguments, and of what is resident, in bytes of a device.
    """
    began, compiler = time.perf_counter(), compilers.describe(topology)
    cores = mesh.size // topology.chips
    shape = {axis: size for axis, size in mesh.shape.items() if size > 1}
    limit = available_memory(topology, mesh.devices.flat[0])
    known = sum(sizes.values()) - resident + sum(new_results.values())
    sizes = {
        n: cores * (sizes.get(n, 0.0) + new_results.get(n, 0.0)) for n in (*sizes, *(set(new_results) - set(sizes)))
    }
    if sum(sizes.values()) > cores * limit:  # the compiler would find out too, minutes later
        seconds = time.perf_counter() - began
        return Compiled(shape, Memory(**sizes), False, cores * limit, 0.0, 0.0, (), seconds, compiler)
    context = gpus.compiling(mesh.devices.flat[0]) if topology.switched else compiling_for("tpu")
    with context:
        lowered = lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = Memory(**sizes, temporary=cores * _temporaries(str(error), known))
        return Compiled(shape, memory, False, cores * limit, 0.0, 0.0, (), time.perf_counter() - began, compiler)
    analysis = compiled.memory_analysis()
    traffic, unread = hlo.Traffic((), 0.0, 0.0, 0.0), ""
    try:
        traffic = hlo.read(compiled.as_text(), branch_frequency)
    except jax.errors.JaxRuntimeError as error:  # jaxlib cannot print instructions that a newer compiler invented
        unread = str(error).splitlines()[0]
    # Two figures, each of which may be too high. The most that lives at a time, which the compiler holds against its
    # limit, has in it what is fetched ahead into memory of the core. `temp_size_in_bytes` counts memory that is used
    # one after the other as if they were used together.
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes - sum(new_results.values())
    beside = analysis.temp_size_in_bytes + fresh
    if not topology.switched:  # a GPU's program takes its temporary memory in one piece
        # an argument that nothing reads, as the head in a prefill, is no argument of the compiled program
        beside = min(beside, analysis.peak_memory_in_bytes - min(known, analysis.argument_size_in_bytes))
    saved = max(traffic.saved_activations - sum(new_results.values()), 0.0)  # results may be filled layer by layer too
    memory = Memory(
        **sizes,
        activations=cores * saved,
        temporary=cores * max(beside - saved, 0.0),
        code=cores * float(analysis.generated_code_size_in_bytes),
    )
    return Compiled(
        mesh=shape,
        memory=memory,
        fits=memory.peak <= cores * limit,
        limit=cores * limit,
        flops=cores * traffic.flops,
        hbm=cores * traffic.hbm,
        axis_traffic=_by_axes(traffic, mesh, topology),
        seconds=time.perf_counter() - began,
        compiler=compiler,
        unread=unread,
    )


def available_memory(topology: Topology, device: jax.Device) -> float:
    """Bytes of HBM that a program may have: what the compiler for TPUs lets it, and JAX takes of a GPU."""
    return gpu_share() * topology.chip.hbm if topology.switched else _most_for(device)


def gpu_share() -> float:
    """Return the share of a GPU's memory that JAX would take in this environment.

    Raises:
      UserError: a value of the environment variable that is no share.
    """
    text = os.environ.get(GPU_SHARE_VARIABLE)
    if not text:
        return GPU_SHARE
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UserError(f"{GPU_SHARE_VARIABLE} is {text!r}: give a share of a GPU's memory above 0 and up to 1, as 0.9")
    return share


@functools.cache
def _most_for(device: jax.Device) -> float:
    """Return what the compiler says when it refuses a program that is far too large."""
    side = 2**20
    huge = jax.ShapeDtypeStruct((side, side), np.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: jax.numpy.sin(x) @ jax.numpy.cos(x)).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        match = re.search(r"(?:available HBM \(|Used \S+ of )([\d.]+)([KMGT])", str(error))
        if match:
            return float(match[1]) * GIGA[match[2]]
        raise
    raise RuntimeError(f"the compiler gave {device} two matrices of {side} x {side}")


def _temporaries(message: str, arguments: float) -> float:
    """Bytes that a refused program asked for beside its arguments. Any other failure is raised again."""
    match = re.search(r"(HLO temporaries \(|Used )([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or not match:
        raise RuntimeError(f"the program does not compile: {message[:2000]}")
    size = float(match[2]) * GIGA[match[3]]
    return max(size - arguments, 0.0) if match[1].startswith("Used") else size


def bytes_of(tree: Any) -> float:
    """Of a tree of abstract arrays with shardings, on one device."""
    return float(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
    )


def _by_axes(traffic: hlo.Traffic, mesh: Mesh, topology: Topology) -> tuple[AxisTraffic, ...]:
    """Bytes by the mesh axes along which the devices of each collective lie."""
    kinds: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for one in traffic.collectives:
        sent = one.sent
        if one.groups is None:
            axes, slices = _between_slices(mesh), topology.slices
            sent *= (2 if one.kind == "all-reduce" else 1) * (slices - 1) / slices
        elif one.groups.shape[1] > 1:
            axes = axes_of(one.groups, mesh, whole=False)
        else:
            continue
        kinds[axes][one.kind] += one.times * sent
        counts[axes][one.kind] += 1
    # plain dicts: dataclasses.asdict of Python 3.11 copies no others
    axis_traffic = (
        AxisTraffic(axes, dict(sizes), dict(counts[axes]), *_bandwidth(axes, mesh, topology))
        for axes, sizes in kinds.items()
    )
    return tuple(sorted(axis_traffic, key=lambda one: -one.seconds))


def _between_slices(mesh: Mesh) -> str:
    """Return the axes along which the slice of a device differs."""
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)
    return " ".join(name for i, name in enumerate(mesh.axis_names) if (slices != slices.take([0], axis=i)).any())


def _bandwidth(axes: str, mesh: Mesh, topology: Topology) -> tuple[float, str]:
    """Bytes a second that a chip can send to the others along mesh axes, and over which network.

    Between machines of GPUs, each of a group's GPUs there sends its part over a card of its own.
    """
    chip = topology.chip
    along = tuple(slice(None) if axis in axes.split() else 0 for axis in mesh.axis_names)
    devices = mesh.devices[along].flatten()
    if topology.switched:
        machines = len({device.process_index for device in devices})
        each = len(devices) / machines
        return (min(chip.link, each * chip.dcn), "dcn") if machines > 1 else (chip.link, "nvlink")
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return chip.dcn, "dcn"
    coordinates = np.array([device.coords for device in devices])
    links = 0
    for dimension, size in enumerate(topology.shape):
        count = len(set(coordinates[:, dimension].tolist()))
        if count > 1:
            links += 2 if count == size and _is_ring(topology, size) else 1
    return (links * chip.link if links else chip.hbm_bandwidth), "ici"  # cores of one chip need no link


def _is_ring(topology: Topology, size: int) -> bool:
    """Whether a side of the torus is closed: whole cubes of four in three dimensions, sides of 16 in two."""
    return size % 4 == 0 if len(topology.shape) == 3 else size == 16

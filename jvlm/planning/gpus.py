"""NVIDIA GPUs to compile for where there is none: XLA's own GPU compiler, told what it would have read off the device.

The compiler is the package that `pip install jax[cuda13]` runs (`jax-cuda13-pjrt`), so what it makes is what a GPU of
that kind would get, but for what it chooses by timing on the device (autotuning), which it leaves out.
"""

from __future__ import annotations

import contextlib
import dataclasses

import jax
from jax.experimental import topologies
from jvlm_kernels.platforms import compiling_for

from jvlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler decides by. Sizes in bytes, bandwidth in bytes a second.

    Attributes:
      capability: compute capability; from 9.0 on, the instructions of that generation alone are used as well (sm_90a).
      processors: streaming multiprocessors.
      shared: shared memory of a multiprocessor; a block of threads can have all but 1 KiB of it.
      clock: GHz.
    """

    label: str
    capability: tuple[int, int]
    processors: int
    lanes: int
    shared: int
    memory: int
    bandwidth: float
    cache: int
    clock: float


# What the devices say of themselves, as in XLA's descriptions of them (openxla/xla, backends/gpu/target_config/specs).
GPUS = {
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 128, 102_400, 23_609_475_072, 0.3e12, 50_331_648, 2.04),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167_936, 85_100_068_864, 2.039e12, 41_943_040, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233_472, 84_942_979_072, 3.352e12, 52_428_800, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 233_472, 151_397_597_184, 4.8e12, 52_428_800, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 233_472, 191_514_411_008, 7.672e12, 132_644_864, 1.965),
}
_PACKAGES = f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"


def devices(name: str, hosts: int = 1, each: int = 1) -> list[jax.Device]:
    """Devices to compile for: ``each`` GPUs of a kind in each of ``hosts`` machines.

    Raises:
      UserError: a kind that is not in `GPUS`.
      UserError: the compiler is not installed; says how to.
    """
    if name not in GPUS:
        raise UserError(f"GPU {name!r}: one of {', '.join(GPUS)}")
    try:
        description = topologies.get_topology_desc(
            "", platform="cuda", topology=f"1x{hosts}x{each}", target_config=_description(GPUS[name])
        )
    except NotImplementedError as error:
        raise UserError(
            f"no compiler for NVIDIA GPUs here: pip install --no-deps {_PACKAGES}, or PYTHONPATH=.venv/gpu-compiler "
            "after `make test`"
        ) from error
    return list(description.devices)


@contextlib.contextmanager
def compiling(device: jax.Device):
    """Lower programs as they would be on such a GPU: with the kernels that it gets by itself.

    JAX 0.11 asks the default device for its generation when it lowers Triton kernels, and a CPU has none.
    """
    gpu = next(gpu for gpu in GPUS.values() if gpu.label == device.device_kind)
    with jax.default_device(device), compiling_for("cuda", ".".join(map(str, gpu.capability))):
        yield


def _description(gpu: Gpu) -> str:
    """Return the compiler's `GpuTargetConfigProto`."""
    major, minor = gpu.capability
    features = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
      gpu_device_info {{
        name: "{gpu.label}"
        cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
        core_count: {gpu.processors}
        fpus_per_core: {gpu.lanes}
        clock_rate_ghz: {gpu.clock}
        device_memory_size: {gpu.memory}
        memory_bandwidth: {gpu.bandwidth:.0f}
        l2_cache_size: {gpu.cache}
        shared_memory_per_core: {gpu.shared}
        shared_memory_per_block: 49152
        shared_memory_per_block_optin: {gpu.shared - 1024}
        registers_per_core_limit: 65536
        registers_per_block_limit: 65536
        threads_per_warp: 32
        threads_per_block_limit: 1024
        threads_per_core_limit: 2048
        thread_dim_limit_x: 1024
        thread_dim_limit_y: 1024
        thread_dim_limit_z: 64
        block_dim_limit_x: 2147483647
        block_dim_limit_y: 65535
        block_dim_limit_z: 65535
        device_address_bits: 64
        driver_version: "13.0.0"
        runtime_version: "13.0.0"
        compile_time_toolkit_version: "13.0.0"
        dnn_version: "9.10.0"
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 10 }}
      device_description_str: "{gpu.label}"
    """

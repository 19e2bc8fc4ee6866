"""Models whose matrices are quantised: as shapes, and from a model that has its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from jvlm.errors import UserError
from jvlm.models.decoders.moe import EXPERT_AXES, MoE
from jvlm.models.layers import Linear
from jvlm.models.vlm import VLM
from jvlm.quantization import formats
from jvlm.quantization.config import QuantizationConfig
from jvlm.quantization.kernels import QuantizedKernel, quantized_kernels

ShardingOf = Callable[[str, nnx.Variable], Sharding]
# A kernel's leading axes (layers, and not experts) -> its parts there.
ReadParts = Callable[[tuple[int, ...]], Mapping[str, np.ndarray]]
WORKERS = 4  # matrices that are quantised at a time: each needs its float32 values for that long


def format_of(config: QuantizationConfig) -> str:
    """Return the key of `formats.PARTS` for a configuration."""
    return "nf4x2" if config.kind == "nf4" and config.double else config.kind


def _matrices(model: VLM) -> Iterator[tuple[str, nnx.Module, str]]:
    """Yield (dotted path, module, name in it) of every kernel of a linear layer or of experts, but for the head's."""
    for parts, module in nnx.iter_modules(model):
        path = ".".join(map(str, parts))
        if isinstance(module, Linear) and path != "decoder.head":
            yield f"{path}.kernel", module, "kernel"
        elif isinstance(module, MoE):
            yield from ((f"{path}.{name}", module, name) for name in EXPERT_AXES)


def targets(model: VLM, config: QuantizationConfig) -> list[tuple[str, nnx.Module, str]]:
    """Return the matrices that are quantised, ordered by path: (dotted path, module, name in it).

    Raises:
      UserError: patterns that match none.
    """
    found = sorted(_matrices(model), key=lambda matrix: matrix[0])
    chosen = [matrix for matrix in found if config.matches(matrix[0].removesuffix(".kernel"))]
    if not chosen:
        some = ", ".join(path.removesuffix(".kernel") for path, *_ in found[:3])
        raise UserError(f"quantize.targets {', '.join(config.targets)} match no linear layer; there are {some}, ...")
    return chosen


def quantized_template(model: VLM, config: QuantizationConfig) -> VLM:
    """Return an abstract model with quantised kernels in place of those that a configuration targets."""
    graph, state = nnx.split(model)
    model, format = nnx.merge(graph, state), format_of(config)
    for path, module, name in targets(model, config):
        variable = getattr(module, name)
        shape, axes = variable.get_value().shape, tuple(variable.get_metadata()["axes"])
        parts = abstract_parts(shape, format, path.removesuffix(".kernel"))
        setattr(module, name, QuantizedKernel(format, parts, shape[-2:], axes))
    return model


def abstract_parts(shape: tuple[int, ...], format: str, path: str = "a kernel") -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of the parts of a kernel [..., in, out]."""
    *leading, d_in, d_out = shape
    if format in ("int8", "fp8"):
        dtype = np.int8 if format == "int8" else np.uint8
        shapes = {"codes": ((d_in, d_out), dtype), "scale": ((d_out,), np.float32)}
    else:
        formats.check_blocks(shape, path)
        blocks = d_in // formats.BLOCK
        shapes = {
            "codes": ((d_in // 2, d_out), np.uint8),
            "scale": ((blocks, d_out), np.float32),
            "scale_codes": ((d_out, blocks), np.uint8),
            "scale_scale": ((-(-d_out * blocks // formats.SCALE_BLOCK),), np.float32),
            "scale_offset": ((), np.float32),
        }
    return {name: jax.ShapeDtypeStruct((*leading, *shapes[name][0]), shapes[name][1]) for name in formats.PARTS[format]}


def fill(path: str, kernel: QuantizedKernel, read: ReadParts, sharding: ShardingOf | None = None) -> None:
    """Give an abstract kernel its values, layer by layer; only its parts are held, and only they reach devices.

    Args:
      read: parts of one layer's kernel, or of all of its experts, called by several threads.
    """
    variables = {name: getattr(kernel, name) for name in formats.PARTS[kernel.format]}
    avals = {name: variable.get_value() for name, variable in variables.items()}
    leading = avals["codes"].shape[: -len(kernel.axes)]
    held = {name: np.empty(aval.shape, aval.dtype) for name, aval in avals.items()}

    def one(index: tuple[int, ...]) -> None:
        for name, value in read(index).items():
            held[name][index] = value

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(one, np.ndindex(*leading)))
    for name, variable in variables.items():
        at = sharding(f"{path}.{name}", variable) if sharding else jax.sharding.SingleDeviceSharding(jax.devices()[0])
        variable.set_value(_put(held.pop(name), at))


def _put(value: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index]).block_until_ready()


def quantized(model: VLM, config: QuantizationConfig, sharding: ShardingOf | None = None) -> VLM:
    """Return a model whose targets are quantised; its other parameters are shared with ``model``."""
    graph, state = nnx.split(model)
    plain = {path: getattr(module, name) for path, module, name in targets(nnx.merge(graph, state), config)}
    result = quantized_template(model, config)
    for path, kernel in quantized_kernels(result):
        value = plain[path].get_value()

        def read(index: tuple[int, ...], value: Any = value, format: str = kernel.format) -> dict[str, np.ndarray]:
            return formats.quantize_all(np.asarray(value[index]), format)

        fill(path, kernel, read, sharding)
    return result


def dequantized(model: VLM, dtype: str) -> VLM:
    """Return a model with plain kernels in a dtype: what its quantised ones stand for."""
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state)
    for _, module, name in list(_matrices(model)):
        kernel = getattr(module, name)
        if isinstance(kernel, QuantizedKernel):
            setattr(module, name, nnx.Param(_dequantized(kernel, dtype), axes=kernel.axes))
    return model


def _dequantized(kernel: QuantizedKernel, dtype: str) -> jax.Array:
    parts = {name: np.asarray(value) for name, value in kernel.parts.items()}
    leading = parts["codes"].shape[:-2]
    value = np.empty((*leading, *kernel.shape), dtype)
    for index in np.ndindex(*leading):
        value[index] = formats.dequantize({name: part[index] for name, part in parts.items()}, kernel.format)
    return jax.numpy.asarray(value)


def size_report(model: VLM) -> str:
    """Return what is quantised, how, and what it weighs, a line for each format."""
    lines, kernels = [], list(quantized_kernels(model))
    for format in sorted({kernel.format for _, kernel in kernels}):
        chosen = [kernel for _, kernel in kernels if kernel.format == format]
        values = [getattr(kernel, name).get_value() for kernel in chosen for name in formats.PARTS[format]]
        weights = sum(math.prod(kernel.stacked_shape) for kernel in chosen)
        size = sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in values)
        lines.append(
            f"quantised: {weights:,} weights as {format}, {size / 2**30:.2f} GiB, {8 * size / weights:.2f} bits each"
        )
    return "\n".join(lines)

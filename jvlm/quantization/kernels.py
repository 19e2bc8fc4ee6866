"""Quantised kernels of linear layers: their parts as parameters, and products that never keep a dequantised kernel.

Axes: i inputs, o outputs.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8
from jvlm_kernels import platforms

from jvlm.models import device_ops
from jvlm.models.decoders.moe import EXPERT_AXES
from jvlm.models.layers import StoredKernel, product
from jvlm.quantization import formats

# of a linear layer, or of a layer's experts
_PART = re.compile(rf"\.(kernel|{'|'.join(EXPERT_AXES)})\.({'|'.join(sorted(set().union(*formats.PARTS.values())))})$")


class QuantizedParam(nnx.Param):
    """A part of a quantised kernel: never trained."""


class QuantizedKernel(StoredKernel):
    """The parts of a format, each a parameter with axes of its own. The backward pass of a product keeps them alone.

    Args:
      parts: by name, as `formats.PARTS` has them; arrays or their shapes, with the leading axes of stacked layers.
      shape: of the kernel of one layer, or of one expert of a layer: (inputs, outputs).
      axes: logical axes of the kernel: those of ``shape``, behind that of a layer's experts if it has any.
    """

    def __init__(self, format: str, parts: Mapping[str, Any], shape: tuple[int, int], axes: tuple[str, ...]):
        self.format, self.shape, self.axes = format, shape, axes
        for name in formats.PARTS[format]:
            setattr(self, name, QuantizedParam(parts[name], axes=_axes_of(name, format, axes)))

    @property
    def parts(self) -> dict[str, Array]:
        return {name: getattr(self, name)[...] for name in formats.PARTS[self.format]}

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        return (*self.codes.get_value().shape[:-2], *self.shape)

    def weight(self, dtype: DTypeLike) -> Float[Array, "*E i o"]:
        return jax.lax.stop_gradient(self._read(dtype)(self.parts))

    def product(self, x: Float[Array, "*L i"], *, pad_in: int = 0, pad_out: int = 0) -> Float[Array, "*L o"]:
        return _product(self._read(x.dtype, pad_in, pad_out), x, self.parts)

    def _read(self, dtype: DTypeLike, pad_in: int = 0, pad_out: int = 0) -> _Read:
        ops = device_ops.current()
        return _Read(self.format, self.axes, jnp.dtype(dtype).name, ops, (pad_in, pad_out))


def _axes_of(part: str, format: str, axes: tuple[str, ...]) -> tuple[str | None, ...]:
    """Return the logical axes of a part. Scales are split where the kernel is; what counts them is small."""
    *experts, i, o = axes
    if part == "codes" or (part == "scale" and format == "nf4"):
        return axes
    return (*experts, *{"scale": (o,), "scale_codes": (o, i), "scale_scale": (None,), "scale_offset": ()}[part])


@dataclasses.dataclass(frozen=True)
class _Read:
    """From parts to the dequantised kernel in a dtype; hashable. The operations are those of the forward pass."""

    format: str
    axes: tuple[str, ...]
    dtype: str
    ops: device_ops.DeviceOps
    padding: tuple[int, int]

    def __call__(self, parts: Mapping[str, Array]) -> Float[Array, "*E i o"]:
        experts = parts["codes"].ndim - 2  # 1, or 0 where one of them was taken out
        axes = self.axes[len(self.axes) - 2 - experts :]
        # gathered as codes: a quarter, or half, of the bytes
        parts = {
            name: self.ops.all_gather_param(value, _axes_of(name, self.format, axes)) for name, value in parts.items()
        }
        read = functools.partial(dequantize, format=self.format, dtype=self.dtype)
        kernel = jax.vmap(read)(parts) if experts else read(parts)
        pad_in, pad_out = self.padding
        return jnp.pad(kernel, ((0, pad_in), (0, pad_out))) if pad_in or pad_out else kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(read: _Read, x: Array, parts: dict[str, Array]) -> Array:
    return product(x, read(parts))


def _product_forward(read, x, parts):
    return product(x, read(parts)), parts


def _product_backward(read, parts, d_y):
    return product(d_y, read(parts).T), None


_product.defvjp(_product_forward, _product_backward)


def dequantize(parts: Mapping[str, Array], format: str, dtype: DTypeLike) -> Float[Array, "i o"]:
    """Return the kernel that parts stand for: computed in float32, rounded once. Source: see `formats`."""
    codes = parts["codes"]
    if format in ("int8", "fp8"):
        if format == "fp8":  # bytes until here: XLA for CPU would convert whole stacks of float8 ahead of their loop
            codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
        return (codes.astype(jnp.float32) * parts["scale"]).astype(dtype)
    scale = parts["scale"] if format == "nf4" else _double_dequantized(parts).T
    blocks = codes.reshape(scale.shape[0], formats.BLOCK // 2, codes.shape[-1])
    values = _nf4_values(jnp.concatenate([blocks >> 4, blocks & 15], 1))
    return (values * scale[:, None]).reshape(-1, codes.shape[-1]).astype(dtype)


def _nf4_values(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    def select(codes: Array) -> Array:
        values: list[Any] = [jnp.float32(value) for value in formats.NF4]
        for bit in (1, 2, 4, 8):
            is_set = (codes & bit) != 0
            values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
        return values[0]

    # TPUs are slow at gathers; selections are elementwise and fuse into what reads them
    return platforms.platform_dependent(codes, tpu=select, default=lambda codes: jnp.asarray(formats.NF4)[codes])


def _double_dequantized(parts: Mapping[str, Array]) -> Float[Array, "o b"]:
    codes, table = parts["scale_codes"], jnp.asarray(formats.dynamic_map())

    def select(codes: Array) -> Array:  # a sum with one term that is not zero: exact
        return jnp.where(codes[..., None] == jnp.arange(len(table), dtype=jnp.uint8), table, 0).sum(-1)

    values = platforms.platform_dependent(codes, tpu=select, default=lambda codes: table[codes])
    factor = jnp.repeat(parts["scale_scale"], formats.SCALE_BLOCK)[: codes.size].reshape(codes.shape)
    return values * factor + parts["scale_offset"]


def is_part(path: str) -> bool:
    """Return whether the dotted path of a parameter is that of a part of a quantised kernel."""
    return _PART.search(path) is not None


def quantized_kernels(model: nnx.Module) -> Iterator[tuple[str, QuantizedKernel]]:
    """Yield the dotted path of each quantised kernel of a model, as its plain form would have it, and the kernel."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, QuantizedKernel):
            yield ".".join(map(str, path)), module

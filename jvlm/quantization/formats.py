"""Number formats of quantised matrices, in numpy: a kernel [in, out] to its parts and back.

A part is an array with a name; `PARTS` has those of each format. Formats are bit-equal with bitsandbytes' (nf4, with
and without double quantisation, and int8) and compressed-tensors' (fp8 with a scale for each output channel; its
codes are bytes).

Axes: i inputs, o outputs, b blocks of inputs, n blocks of scales.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from jaxtyping import Float, Integer, UInt8

from jvlm.errors import UserError

BLOCK = 64  # inputs that share a scale in nf4
SCALE_BLOCK = 256  # scales that share a scale under double quantisation
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_MAX = np.float32(448)

# The 16 values of bitsandbytes' NormalFloat: quantiles of a normal distribution, with an exact zero.
NF4 = np.array(
    [
        -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ],
    np.float32,
)  # fmt: skip

Parts = Mapping[str, np.ndarray]
# Format -> its parts; "nf4x2" is nf4 with double quantisation.
PARTS = {
    "int8": ("codes", "scale"),
    "fp8": ("codes", "scale"),
    "nf4": ("codes", "scale"),
    "nf4x2": ("codes", "scale_codes", "scale_scale", "scale_offset"),
}


def quantize(kernel: Float[np.ndarray, "i o"], format: str) -> dict[str, np.ndarray]:
    """Return the parts of a kernel in a format of `PARTS`.

    Raises:
      UserError: nf4 of a number of inputs that blocks do not divide; values that are not finite.
    """
    weight = np.ascontiguousarray(kernel.T, np.float32)  # by outputs, as formats count
    if not np.isfinite(weight).all():
        raise UserError(f"a kernel of shape {kernel.shape} holds values that are not finite: it cannot be quantised")
    if format in ("int8", "fp8"):
        absmax = np.abs(weight).max(1)
        if format == "int8":
            factor = np.divide(np.float32(127), absmax, out=np.zeros_like(absmax), where=absmax > 0)
            codes, scale = np.rint(weight * factor[:, None]).astype(np.int8), absmax / np.float32(127)
        else:
            scale = np.where(absmax > 0, absmax / FP8_MAX, np.float32(1))
            codes = np.clip(weight / scale[:, None], -FP8_MAX, FP8_MAX).astype(FP8).view(np.uint8)
        return {"codes": np.ascontiguousarray(codes.T), "scale": scale}
    check_blocks(kernel.shape)
    codes, absmax = nf4_codes(weight)
    parts = {"codes": arranged(codes)}
    if format == "nf4":
        return {**parts, "scale": np.ascontiguousarray(absmax.T)}
    return {**parts, **dict(zip(PARTS["nf4x2"][1:], double_quantized(absmax), strict=True))}


def quantize_all(kernels: Float[np.ndarray, "*E i o"], format: str) -> dict[str, np.ndarray]:
    """Return the parts of a kernel, or of each kernel of a stack, stacked. Raises as `quantize`."""
    if kernels.ndim == 2:
        return quantize(kernels, format)
    each = [quantize_all(kernel, format) for kernel in kernels]
    return {name: np.stack([parts[name] for parts in each]) for name in PARTS[format]}


def dequantize(parts: Parts, format: str) -> Float[np.ndarray, "i o"]:
    """Return the kernel that parts stand for, in float32."""
    if format in ("int8", "fp8"):
        codes = parts["codes"] if format == "int8" else parts["codes"].view(FP8)
        return codes.astype(np.float32) * parts["scale"]
    if format == "nf4x2":
        absmax = double_dequantized(parts["scale_codes"], parts["scale_scale"], parts["scale_offset"])
    else:
        absmax = parts["scale"].T
    values = NF4[unarranged(parts["codes"])]
    weight = (values.reshape(*absmax.shape, BLOCK) * absmax[..., None]).reshape(values.shape)
    return np.ascontiguousarray(weight.T)


def check_blocks(shape: tuple[int, ...], path: str = "a kernel") -> None:
    """Raise UserError if blocks of nf4 do not divide the inputs of a kernel [..., in, out]."""
    if shape[-2] % BLOCK:
        raise UserError(
            f"quantize.kind nf4 needs inputs in multiples of {BLOCK}, and {path} has {shape[-2]}, shape "
            f"{tuple(shape)}; leave it out of quantize.targets, or choose int8 or fp8"
        )


def nf4_codes(weight: Float[np.ndarray, "o i"]) -> tuple[UInt8[np.ndarray, "o i"], Float[np.ndarray, "o b"]]:
    """Return the nearest of the 16 values for each weight, as its index, and the largest magnitude of each block."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    absmax = np.abs(blocks).max(-1)
    return nearest(_normalised(blocks, absmax), NF4).reshape(weight.shape), absmax


def _normalised(blocks: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    inverse = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    return np.clip(blocks * inverse[..., None], -1, 1)


def nearest(values: Float[np.ndarray, "*L"], table: Float[np.ndarray, " n"]) -> UInt8[np.ndarray, "*L"]:
    """Return the index of the entry of an ascending table that is nearest to each value."""
    midpoints = (table[1:] + table[:-1]) / np.float32(2)
    return np.searchsorted(midpoints, values, side="left").astype(np.uint8)


def arranged(codes: Integer[np.ndarray, "o i"]) -> UInt8[np.ndarray, "h o"]:
    """Return codes of 4 bits by inputs, two a byte: of a block's halves, the first in the high four bits.

    bitsandbytes puts neighbours into one byte. With halves a device unpacks without moving single rows.
    """
    outputs, inputs = codes.shape
    halves = codes.reshape(outputs, inputs // BLOCK, 2, BLOCK // 2)
    packed = (halves[:, :, 0] << 4) | halves[:, :, 1]
    return np.ascontiguousarray(packed.reshape(outputs, inputs // 2).T.astype(np.uint8))


def unarranged(packed: UInt8[np.ndarray, "h o"]) -> UInt8[np.ndarray, "o i"]:
    """Return the codes again that `arranged` packed."""
    half, outputs = packed.shape
    blocks = packed.T.reshape(outputs, -1, 1, BLOCK // 2)
    return np.concatenate([blocks >> 4, blocks & 15], 2).reshape(outputs, 2 * half)


@functools.cache
def dynamic_map() -> Float[np.ndarray, "256"]:
    """Return bitsandbytes' 256 signed values for quantities of any size (arXiv 1511.04561), ascending."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace(2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


def _linspace(count: int) -> np.ndarray:
    """Return float32 from 0.1 to 1 as torch computes them: from both ends, with one rounding each."""
    first, steps = np.float32(0.1), np.arange(count)
    step = np.float64((np.float32(1) - first) / np.float32(count - 1))
    return np.where(steps < count // 2, first + step * steps, 1 - step * (count - 1 - steps)).astype(np.float32)


def double_quantized(
    absmax: Float[np.ndarray, "o b"],
) -> tuple[UInt8[np.ndarray, "o b"], Float[np.ndarray, " n"], Float[np.ndarray, ""]]:
    """Return scales as 8-bit codes, the largest magnitude of each block of them, and their mean (taken off)."""
    offset = np.float32(absmax.mean(dtype=np.float32))
    flat = (absmax - offset).reshape(-1)
    count = -(-flat.size // SCALE_BLOCK)
    blocks = np.pad(flat, (0, count * SCALE_BLOCK - flat.size)).reshape(count, SCALE_BLOCK)
    largest = np.abs(blocks).max(-1)
    codes = nearest(_normalised(blocks, largest), dynamic_map())
    return codes.reshape(-1)[: flat.size].reshape(absmax.shape), largest, np.asarray(offset)


def double_dequantized(
    codes: UInt8[np.ndarray, "*b"],
    largest: Float[np.ndarray, " n"],
    offset: Float[np.ndarray | np.float32, ""],
    table: Float[np.ndarray, "256"] | None = None,
) -> Float[np.ndarray, "*b"]:
    """Return the scales that `double_quantized` took; ``table`` is another map of codes to values."""
    table = dynamic_map() if table is None else table
    factor = np.repeat(largest, SCALE_BLOCK)[: codes.size].reshape(codes.shape)
    return table[codes] * factor + offset

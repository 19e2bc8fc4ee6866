"""Matrices rounded to integers with a scale for each group of inputs: to nearest, by GPTQ, and AWQ's scales before it.

Sources: GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978; ranges and order of rounding as in compressed-tensors.

Axes: o outputs, i inputs, g groups of inputs.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int8, UInt8

from jvlm.errors import UserError
from jvlm.quantization import formats

Weight = Float[np.ndarray, "o i"]
Gram = Float[np.ndarray, "i i"]  # sum of the outer products of a matrix's inputs
DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, as in the paper's code
AWQ_STEPS = 20  # exponents that are tried


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Codes and scales; the values are ``codes * scale``, computed in the scale's dtype.

    Attributes:
      codes: of integers; of fp8 its bytes.
      scale: [out, groups]; one group is a scale for each output.
    """

    codes: Int8[np.ndarray, "o i"] | UInt8[np.ndarray, "o i"]
    scale: Float[np.ndarray, "o g"]

    def values(self) -> Weight:
        """Return the matrix that is stood for, in float32."""
        codes = self.codes.view(formats.FP8) if self.codes.dtype == np.uint8 else self.codes
        grouped = codes.astype(self.scale.dtype).reshape(*self.scale.shape, -1)
        return (grouped * self.scale[..., None]).reshape(codes.shape).astype(np.float32)


def check_groups(inputs: int, group: int, path: str) -> None:
    """Raise UserError for groups that do not divide a matrix's inputs."""
    if inputs % group:
        fitting = next(size for size in (128, 64, 32, 16, 8, inputs) if inputs % size == 0)
        raise UserError(
            f"{path} has {inputs} inputs, which groups of {group} do not divide; choose another group_size, "
            f"as {fitting}"
        )


def fp8(weight: Weight, dtype: str) -> Rounded:
    """Return e4m3 with a scale for each output."""
    absmax = np.abs(weight).max(1, keepdims=True)
    scale = np.where(absmax > 0, absmax / formats.FP8_MAX, np.float32(1)).astype(dtype)
    codes = np.clip(weight / scale.astype(np.float32), -formats.FP8_MAX, formats.FP8_MAX).astype(formats.FP8)
    return Rounded(codes.view(np.uint8), scale)


def to_nearest(weight: Weight, *, bits: int, group: int, dtype: str) -> Rounded:
    """Return each weight rounded by itself; the largest of a group takes the whole range."""
    scale = _scales(weight.reshape(len(weight), -1, group), bits, dtype)
    return Rounded(_codes(weight, np.repeat(scale, group, 1), bits), scale)


def _scales(grouped: np.ndarray, bits: int, dtype: str) -> np.ndarray:
    absmax = np.abs(grouped).max(-1)
    return np.where(absmax > 0, absmax / np.float32((2**bits - 1) / 2), np.float32(1)).astype(dtype)


def _codes(weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    limit = 2 ** (bits - 1)
    return np.clip(np.rint(weight / scale.astype(np.float32)), -limit, limit - 1).astype(np.int8)


def gptq(weight: Weight, gram: Gram, *, bits: int, group: int, dtype: str, block: int = 128) -> Rounded:
    """Return weights rounded input by input, each error taken up by the inputs that come after.

    Args:
      gram: of the inputs that the matrix sees.
      block: inputs whose errors reach the rest together.
    """
    weight, count = weight.astype(np.float32).copy(), weight.shape[1]
    hessian = gram.astype(np.float32).copy()
    unseen = np.diag(hessian) <= 0  # inputs that are always zero: any weight does
    hessian[unseen, unseen] = 1
    weight[:, unseen] = 0
    hessian[np.diag_indices(count)] += DAMPING * np.diag(hessian).mean()
    factor = scipy.linalg.cholesky(scipy.linalg.inv(hessian, check_finite=False), check_finite=False)  # upper
    codes = np.zeros(weight.shape, np.int8)
    scale = np.zeros((len(weight), count // group), dtype)
    for begin in range(0, count, block):
        end = min(begin + block, count)
        errors = np.zeros((len(weight), end - begin), np.float32)
        for at in range(begin, end):
            if at % group == 0:
                # what the errors of this block have yet to add to the group's later inputs
                ahead = weight[:, at : at + group].copy()
                ahead[:, max(end - at, 0) :] -= errors[:, : at - begin] @ factor[begin:at, max(end, at) : at + group]
                scale[:, at // group] = _scales(ahead, bits, dtype)
            column = scale[:, at // group]
            codes[:, at] = _codes(weight[:, at], column, bits)
            error = (weight[:, at] - codes[:, at] * column.astype(np.float32)) / factor[at, at]
            weight[:, at:end] -= error[:, None] * factor[at, at:end]
            errors[:, at - begin] = error
        weight[:, end:] -= errors @ factor[begin:end, end:]
    return Rounded(codes, scale)


def awq_scale(
    weights: list[Weight], gram: Gram, magnitude: Float[np.ndarray, " i"], *, bits: int, group: int, dtype: str
) -> Float[np.ndarray, " i"]:
    """Return what to multiply the inputs' columns by, so that weights of large inputs lose less.

    Of magnitude ** a, for a from 0 to below 1, the one with the least error of the outputs, summed over the matrices
    that see these inputs.

    Args:
      magnitude: mean magnitude of each input.
    """
    best, least = np.ones_like(magnitude), np.inf
    for step in range(AWQ_STEPS):
        scale = np.maximum(magnitude, 1e-4) ** (step / AWQ_STEPS)
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        error = 0.0
        for weight in weights:
            rounded = to_nearest(weight * scale, bits=bits, group=group, dtype=dtype).values() / scale
            error += _quadratic(rounded - weight, gram)
        if error < least:
            best, least = scale, error
    return best


def output_error(weight: Weight, rounded: Weight, gram: Gram) -> float:
    """Return the root mean square error of the outputs, as a share of the outputs' own."""
    own = _quadratic(weight, gram)
    return float(np.sqrt(max(_quadratic(rounded - weight, gram), 0.0) / own)) if own > 0 else 0.0


def _quadratic(weight: np.ndarray, gram: np.ndarray) -> float:
    return float(np.einsum("oi,oi->", weight @ gram, weight, dtype=np.float64))

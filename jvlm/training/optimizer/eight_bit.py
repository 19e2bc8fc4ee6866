"""AdamW's moments in 8 bits, after bitsandbytes (Dettmers et al., arXiv 2110.02861).

A block of values is stored as its largest magnitude, in float32, and a code of 8 bits for each value divided by it. The
256 values that codes stand for are bitsandbytes' dynamic map: seven decades, of which each has twice as many values as
the one below, evenly spaced from a tenth to the whole of it; and 0, and 1. The map of second moments, which are never
negative, has twice as many in each. Codes number the values in ascending order, as in bitsandbytes.

Codes have the shape of the parameter and are sharded like it. A block runs along one axis of a matrix, not over its
flattened values, so that a mesh that splits the other axis cuts none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

BLOCK = 256
_MIN_SIZE = 4096  # matrices of fewer values stay in float32, as in bitsandbytes
_DECADES = 7


class Quantized(NamedTuple):
    """An array in 8 bits.

    Attributes:
      codes: of the array's shape.
      scale: largest magnitude of each block; the array's shape with blocks in place of the axis that they run along.
    """

    codes: UInt8[Array, "..."]
    scale: Float[Array, "..."]


class ScaleByAdam8bitState(NamedTuple):
    """State of `scale_by_adam_8bit`: moments by path, `Quantized` or float32."""

    count: Int[Array, ""]
    mu: dict[str, Quantized | jax.Array]
    nu: dict[str, Quantized | jax.Array]


def scale_by_adam_8bit(
    beta1: float, beta2: float, eps: float, variables: Mapping[str, nnx.Variable]
) -> optax.GradientTransformation:
    """Return `optax.scale_by_adam` with the moments of matrices in 8 bits between steps.

    A step is computed in float32 from the moments as they are before they are stored. Embedding and position tables,
    norms, biases and matrices below 4,096 values keep moments in float32, as transformers has it with bitsandbytes.
    """
    axes = {path: _block_axis(v) for path, v in variables.items()}
    stacked = {path: v.get_value().ndim > len(v.get_metadata()["axes"]) for path, v in variables.items()}

    def zeros(params, signed: bool):
        whole = {path: jnp.zeros(p.shape, jnp.float32) for path, p in params.items()}
        return {p: z if axes[p] is None else quantize(z, axes[p], signed=signed) for p, z in whole.items()}

    def init(params):
        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), zeros(params, True), zeros(params, False))

    def update(gradients, state, params=None):
        count = optax.safe_increment(state.count)
        corrections = 1 - beta1 ** count.astype(jnp.float32), 1 - beta2 ** count.astype(jnp.float32)
        steps, mu, nu = {}, {}, {}
        for path, gradient in gradients.items():
            axis = axes[path]

            def one(values, axis=axis):
                g, m, v = values
                g = g.astype(jnp.float32)
                m, v = (x if axis is None else dequantize(x, axis, signed=s) for x, s in ((m, True), (v, False)))
                m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
                step = (m / corrections[0]) / (jnp.sqrt(v / corrections[1]) + eps)
                if axis is None:
                    return step, m, v
                return step, quantize(m, axis, signed=True), quantize(v, axis, signed=False)

            values = gradient, state.mu[path], state.nu[path]
            # a layer at a time: the moments of all layers in float32 would take what 8 bits save
            layered = axis is not None and stacked[path]
            steps[path], mu[path], nu[path] = jax.lax.map(one, values) if layered else one(values)
        return steps, ScaleByAdam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _block_axis(variable: nnx.Variable) -> int | None:
    """Return the axis that blocks run along, the longer one of a matrix; None for what stays in float32."""
    axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
    if len(axes) < 2 or axes[0] in ("vocab", "position") or shape[-1] * shape[-2] < _MIN_SIZE:
        return None
    return -1 if shape[-1] >= shape[-2] else -2


def block_length(length: int) -> int:
    """Return the values of a block along an axis: at most 256 of them, and if possible a whole number of blocks.

    Of these one that is a multiple of 16, where blocks are no shorter than 128 then: devices that split the axis then
    cut no block.
    """
    divisors = [size for size in range(BLOCK, BLOCK // 2 - 1, -1) if length % size == 0]
    even = [size for size in divisors if length // size % 16 == 0]
    return (even or divisors or [BLOCK])[0]


def _blocks(x: Array, axis: int) -> Array:
    """Split an axis into (blocks, values of a block), the last block filled up with zeros."""
    axis %= x.ndim
    size = block_length(x.shape[axis])
    lacking = -x.shape[axis] % size
    if lacking:
        x = jnp.pad(x, [(0, lacking if a == axis else 0) for a in range(x.ndim)])
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _joined(blocks: Array, axis: int, length: int) -> Array:
    """Undo `_blocks` for an array whose axis has ``length``."""
    axis %= blocks.ndim - 1
    whole = blocks.reshape(*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])
    return jax.lax.slice_in_dim(whole, 0, length, axis=axis)


def quantize(x: Float[Array, "..."], axis: int, *, signed: bool) -> Quantized:
    """Return an array in 8 bits, in blocks along an axis. ``signed`` or not must be as it is read back."""
    blocks, at = _blocks(x, axis), axis % x.ndim + 1
    scale = jnp.abs(blocks).max(at)
    shares = blocks / jnp.expand_dims(jnp.where(scale > 0, scale, 1.0), at)
    return Quantized(_joined(encode(shares, signed=signed), axis, x.shape[axis]), scale)


def dequantize(x: Quantized, axis: int, *, signed: bool) -> Float[Array, "..."]:
    """Return the array that `quantize` made codes of, float32."""
    blocks = decode(_blocks(x.codes, axis), signed=signed) * jnp.expand_dims(x.scale, axis % x.codes.ndim + 1)
    return _joined(blocks, axis, x.codes.shape[axis])


# Values are counted from 0 outwards. Counted from 1 (signed) or 2 (not), the first bit of a number is its decade, and
# the rest its position in the decade: 2 ** d values, of which value k is (0.1 + 0.9 (k + 0.5) / 2 ** d) of the decade.


def decode(codes: UInt8[Array, "..."], *, signed: bool) -> Float[Array, "..."]:
    """Return the values of the dynamic map that codes stand for."""
    codes = codes.astype(jnp.int32)
    first = 0 if signed else 1
    rank = jnp.abs(codes - 127) if signed else codes
    number = rank + first
    decade = 31 - jax.lax.clz(jnp.maximum(number, 1))
    step = (number - (1 << decade)).astype(jnp.float32)
    count = (1 << decade).astype(jnp.float32)
    value = _power_of_ten(decade - first - (_DECADES - 1)) * (0.1 + 0.9 * (step + 0.5) / count)
    value = jnp.where(rank == 0, 0.0, jnp.where(codes == 255, 1.0, value))
    return jnp.where(codes < 127, -value, value) if signed else value


def encode(x: Float[Array, "..."], *, signed: bool) -> UInt8[Array, "..."]:
    """Return the codes of the nearest values of the dynamic map, for numbers from -1 (or 0) to 1."""
    first = 0 if signed else 1
    size, top = jnp.abs(x), _DECADES - 1
    # halfway between the last value of each decade and the first of the next; between the last and 1; and to 0
    upper = [_halfway(d, first) for d in range(_DECADES)]
    decade = sum((size > bound).astype(jnp.int32) for bound in upper[:top])
    count = (1 << (decade + first)).astype(jnp.float32)
    step = jnp.floor((size * _power_of_ten(top - decade) - 0.1) / 0.9 * count)
    number = (count + jnp.clip(step, 0, count - 1)).astype(jnp.int32)
    rank = jnp.where(size > _first_value(first) / 2, number - first, 0)
    if not signed:
        return jnp.where(size > upper[top], 255, rank).astype(jnp.uint8)
    # there is a 1, but no -1
    return jnp.where(x > upper[top], 255, jnp.where(x < 0, 127 - rank, 127 + rank)).astype(jnp.uint8)


def _first_value(first: int) -> float:
    return 10.0 ** (1 - _DECADES) * (0.1 + 0.45 / 2**first)


def _halfway(decade: int, first: int) -> float:
    count, unit = 2 ** (decade + first), 10.0 ** (decade + 1 - _DECADES)
    last = 1 - 0.45 / count
    following = 1.0 if decade == _DECADES - 1 else 10 * (0.1 + 0.45 / (2 * count))
    return unit * (last + following) / 2


def _power_of_ten(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """Return 10 ** exponent, correctly rounded, for exponents from -6 to 6."""
    value = jnp.ones(exponent.shape, jnp.float32)
    for power in range(1, _DECADES):
        value = jnp.where(exponent == power, 10.0**power, value)
        value = jnp.where(exponent == -power, 10.0**-power, value)
    return value

"""Layers that the towers share: linear maps, norms, MLPs, rotary embeddings.

Parameters carry ``axes``, the logical name of each dimension; nothing here knows how they are sharded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num
from jvlm_kernels import platforms

from jvlm.models import device_ops

RematPolicy = Literal["none", "full", "dots", "attention"]
DType = Literal["float32", "bfloat16", "float16"]


# Of pixels between 0 and 1, as CLIP and Qwen have them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes, rematerialisation, attention implementation and initialisation of a model; the same for every tower.

    Attributes:
      param_dtype: dtype in which parameters are stored.
      compute_dtype: dtype of the inputs of matrix products. Norms, softmax, rotary angles, logits and loss are float32.
      remat: what the backward pass recomputes: nothing ("none"), every layer ("full"), all but matrix products and
        attention ("dots"), or all but attention ("attention").
      attention: implementation name for `jvlm_kernels.segment_attention`; None is the first that supports the call.
      initializer_range: standard deviation of new weights; None is 1 / sqrt(fan in) for each weight, which small
        models trained from random weights need.
    """

    param_dtype: DType = "float32"
    compute_dtype: DType = "bfloat16"
    remat: RematPolicy = "none"
    attention: str | None = None
    initializer_range: float | None = 0.02

    def init_weight(self, key: Array, shape: tuple[int, int], fan_in: int) -> Float[Array, "a b"]:
        """Return a normally distributed matrix in the parameter dtype."""
        scale = fan_in**-0.5 if self.initializer_range is None else self.initializer_range
        return jax.random.normal(key, shape, jnp.dtype(self.param_dtype)) * jnp.asarray(scale, self.param_dtype)


def product(x: Float[Array, "*L i"], kernel: Float[Array, "i o"]) -> Float[Array, "*L o"]:
    """Return ``x @ kernel``. Of 16 bits on a CPU, XLA is slow with a result of 16 bits and with a single row.

    It then multiplies numbers one by one, several times as slowly as in float32. With a float32 result it has the
    matrix instructions of the CPU, where there are any.
    """
    if jnp.result_type(x, kernel).itemsize != 2 or platforms.target_platform() != "cpu":
        return x @ kernel
    *lead, width = x.shape
    rows = x.reshape(-1, width)
    rows = jnp.pad(rows, ((0, 1), (0, 0))) if len(rows) == 1 else rows
    y = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)[: math.prod(lead)]
    return y.astype(jnp.result_type(x, kernel)).reshape(*lead, kernel.shape[1])


@jax.custom_vjp
def matmul(x: Float[Array, "*L i"], kernel: Float[Array, "i o"]) -> Float[Array, "*L o"]:
    """Return ``x @ kernel``, with the weight's gradient as one contraction.

    JAX's own transpose of a product with several leading axes makes XLA copy both operands on CPU: with it, the
    gradient of a SwiGLU takes twice as long. With one contraction it copies the left operand only, which should be the
    narrower one: that makes a weight gradient up to 1.2 times as fast, and that of a LoRA's first matrix 5 to 20 times.
    """
    return product(x, kernel)


def _matmul_forward(x, kernel):
    return product(x, kernel), (x, kernel)


def _matmul_backward(saved, d_y):
    x, kernel = saved
    return product(d_y, kernel.T), _kernel_gradient(x, d_y)


def _kernel_gradient(x, d_y):
    if d_y.shape[-1] < x.shape[-1] and platforms.target_platform() == "cpu":
        # behind the barrier, XLA cannot turn the product around again
        return jax.lax.optimization_barrier(jnp.einsum("...o,...i->oi", d_y, x)).T
    return jnp.einsum("...i,...o->io", x, d_y)


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def adapted_matmul(
    x: Float[Array, "*L i"], kernel: Float[Array, "i o"], a: Float[Array, "i r"], b: Float[Array, "r o"]
) -> Float[Array, "*L o"]:
    """Return ``x @ (kernel + a @ b)``, with gradients of ``a`` and ``b`` that never form one of the kernel's size.

    The sum of the kernels is cheap where there are more vectors than inputs; ``x @ kernel + (x @ a) @ b`` writes and
    reads a result of that many vectors once more, forward and backward.
    """
    return product(x, kernel + product(a, b))


def _adapted_forward(x, kernel, a, b):
    return product(x, kernel + product(a, b)), (x, kernel, a, b)


def _adapted_backward(saved, d_y):
    x, kernel, a, b = saved
    d_x = product(d_y, (kernel + product(a, b)).T)
    d_a, d_b = _kernel_gradient(x, product(d_y, b.T)), _kernel_gradient(product(x, a), d_y)
    return d_x, _kernel_gradient(x, d_y), d_a, d_b


adapted_matmul.defvjp(_adapted_forward, _adapted_backward)


@jax.custom_vjp
def scaled(x: Float[Array, "*L d"], scale: Float[Array, " d"]) -> Float[Array, "*L d"]:
    """Return ``x * scale``, with the gradient of ``scale`` as a sum of products that are stored first on CPU.

    XLA fuses the products into the sum over the leading axes there, which takes five times as long.
    """
    return x * scale


def _scaled_forward(x, scale):
    return x * scale, (x, scale)


def _scaled_backward(saved, d_y):
    x, scale = saved
    products = d_y * x
    if platforms.target_platform() == "cpu":
        products = jax.lax.optimization_barrier(products)
    return d_y * scale, products.sum(range(x.ndim - 1))


scaled.defvjp(_scaled_forward, _scaled_backward)


class StoredKernel(nnx.Module):
    """A frozen kernel in another form than its values, as `jvlm.quantization.kernels.QuantizedKernel`.

    Attributes:
      shape: of the kernel, (inputs, outputs), without the leading axes of stacked layers.
    """

    shape: tuple[int, int]

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape with the leading axes of stacked layers."""
        raise NotImplementedError

    def weight(self, dtype: DTypeLike) -> Float[Array, "i o"]:
        """Return the kernel in a dtype. No gradient flows into it."""
        raise NotImplementedError

    def product(self, x: Float[Array, "*L i"], *, pad_in: int = 0, pad_out: int = 0) -> Float[Array, "*L o"]:
        """Return ``x`` times the kernel with rows and columns of zeros added, in the dtype of ``x``."""
        raise NotImplementedError


class Linear(nnx.Module):
    """``x @ kernel + bias`` in the compute dtype.

    Attributes:
      kernel: a parameter, or a `StoredKernel` that took its place.
      adapter: a `jvlm.adapters.layers.LowRankAdapter` beside the kernel, or None.
    """

    def __init__(
        self, d_in: int, d_out: int, axes: tuple[str, str], *, bias: bool, precision: Precision, rngs: nnx.Rngs
    ):
        dtype = jnp.dtype(precision.param_dtype)
        self.compute_dtype, self.axes = precision.compute_dtype, axes
        self.kernel = nnx.Param(precision.init_weight(rngs.params(), (d_in, d_out), d_in), axes=axes)
        self.bias = nnx.Param(jnp.zeros((d_out,), dtype), axes=axes[1:]) if bias else None
        self.adapter = None

    def __call__(self, x: Float[Array, "*L i"], *, pad_in: int = 0, pad_out: int = 0) -> Float[Array, "*L o"]:
        """Return the map of ``x``, with ``pad_in`` rows and ``pad_out`` columns of zeros added; see `width_padding`."""
        dtype = jnp.dtype(self.compute_dtype)
        if isinstance(self.kernel, StoredKernel):
            y = self.kernel.product(x.astype(dtype), pad_in=pad_in, pad_out=pad_out)
        else:
            kernel = self.weight(dtype)
            pair = None if self.adapter is None else self.adapter.pair_to_add(x.astype(dtype))
            if pair is not None:
                y = adapted_matmul(x.astype(dtype), kernel, *pair)
                return y if self.bias is None else y + self.bias[...].astype(dtype)
            if pad_in or pad_out:
                kernel = jnp.pad(kernel, ((0, pad_in), (0, pad_out)))
            y = matmul(x.astype(dtype), kernel)
        if self.adapter is not None:
            x, y = (v[..., : v.shape[-1] - pad] if pad else v for v, pad in ((x, pad_in), (y, pad_out)))
            y = self.adapter(x.astype(dtype), y, self.stored_weight)
            y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, pad_out)]) if pad_out else y
        return y if self.bias is None else y + jnp.pad(self.bias[...].astype(dtype), (0, pad_out))

    def weight(self, dtype: DTypeLike) -> Float[Array, "i o"]:
        """Return the kernel in a dtype, gathered, and dequantised if it is stored quantised."""
        if isinstance(self.kernel, StoredKernel):
            return self.kernel.weight(dtype)
        return device_ops.current().all_gather_param(self.kernel[...].astype(dtype), self.axes)

    def stored_weight(self) -> Float[Array, "i o"]:
        """Return the kernel as it is stored, in float32."""
        if isinstance(self.kernel, StoredKernel):
            return self.kernel.weight(jnp.float32)
        return self.kernel[...].astype(jnp.float32)

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape of the kernel, with the leading axes of stacked layers: [..., in, out]."""
        return self.kernel.stacked_shape if isinstance(self.kernel, StoredKernel) else self.kernel.get_value().shape


def width_padding(width: int, dtype: DType) -> int:
    """Return how many columns to add to a matrix so that NVIDIA GPUs multiply it at full speed; 0 elsewhere.

    Their matrix products load rows in units of 16 bytes. Rows of another length, as the 3,420 hidden units of
    Qwen2.5-VL's vision tower in bfloat16, go through slower kernels (docs/results/gpu.md).
    """
    if platforms.target_platform() != "cuda" or width * jnp.dtype(dtype).itemsize % 16 == 0:
        return 0
    return -width % 64


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32, scaled in the dtype of its input (as in Llama)."""

    def __init__(self, width: int, eps: float, *, precision: Precision):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.dtype(precision.param_dtype)), axes=("norm",))

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*L d"]) -> Float[Array, "*L d"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return scaled(x32.astype(x.dtype), self.scale[...].astype(x.dtype))


class LayerNorm(nnx.Module):
    """Mean and variance normalised in float32, then scale and bias."""

    def __init__(self, width: int, eps: float, *, precision: Precision):
        self.eps = eps
        dtype = jnp.dtype(precision.param_dtype)
        self.scale = nnx.Param(jnp.ones((width,), dtype), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((width,), dtype), axes=("norm",))

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*L d"]) -> Float[Array, "*L d"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 - x32.mean(axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        y = scaled(x32, self.scale[...].astype(jnp.float32)) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class MLP(nnx.Module):
    """``down(act(up(x)))`` with biases."""

    def __init__(self, width: int, hidden: int, activation: str, *, precision: Precision, rngs: nnx.Rngs):
        self.activation = activation
        self.up = Linear(width, hidden, ("embed", "mlp"), bias=True, precision=precision, rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), bias=True, precision=precision, rngs=rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*L d"]) -> Float[Array, "*L d"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))``; ``d_out`` is the width of the result, None the width of ``x``."""

    def __init__(
        self, width: int, hidden: int, *, d_out: int | None = None, bias: bool, precision: Precision, rngs: nnx.Rngs
    ):
        common = {"bias": bias, "precision": precision, "rngs": rngs}
        self.hidden, self.compute_dtype = hidden, precision.compute_dtype
        self.gate = Linear(width, hidden, ("embed", "mlp"), **common)
        self.up = Linear(width, hidden, ("embed", "mlp"), **common)
        self.down = Linear(hidden, d_out or width, ("mlp", "embed"), **common)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*L d"]) -> Float[Array, "*L o"]:
        # a split axis is left as it is: each device has a part of the width
        extra = 0 if device_ops.current().is_split("mlp") else width_padding(self.hidden, self.compute_dtype)
        hidden = jax.nn.silu(self.gate(x, pad_out=extra)) * self.up(x, pad_out=extra)
        return self.down(hidden, pad_in=extra)


def normalise_pixels(
    patches: Num[Array | np.ndarray, "*L c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Num[Array, "*L c"]:
    """Return bytes as (x / 255 - mean) / std, channel by channel; floats are taken as normalised already.

    Patches are flattened with the channel first.
    """
    patches = jnp.asarray(patches)
    if patches.dtype != jnp.uint8:
        return patches
    repeats = patches.shape[-1] // len(mean)
    wide_mean, wide_std = (np.repeat(np.asarray(x, np.float32), repeats) for x in (mean, std))
    return (patches.astype(jnp.float32) * np.float32(1 / 255) - wide_mean) / wide_std


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies for contexts ``factor`` times longer than the pre-training's.

    "linear" divides all of them. "llama3" (Llama 3.1) divides those with wavelengths above
    ``original_max_position_embeddings / low_freq_factor`` tokens, leaves those below
    ``original_max_position_embeddings / high_freq_factor`` as they are, and interpolates between the two.

    Attributes:
      kind: "linear" or "llama3", see above.
      factor: how many times longer the context is.
      low_freq_factor: rotations in the original context below which a frequency is divided by ``factor``.
      high_freq_factor: rotations in the original context above which a frequency stays.
      original_max_position_embeddings: positions of the original context.
    """

    kind: Literal["linear", "llama3"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        if self.kind == "linear":
            return (frequencies / np.float32(self.factor)).astype(np.float32)
        rotations = self.original_max_position_embeddings * frequencies / (2 * np.pi)
        unchanged = np.clip((rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return (frequencies * (unchanged + (1 - unchanged) / self.factor)).astype(np.float32)


def rotary_frequencies(size: int, theta: float, scaling: RopeScaling | None = None) -> Float[np.ndarray, " f"]:
    """Return ``theta ** -(2i / size)`` for i < size / 2, scaled, in float32."""
    plain = (1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / size)).astype(np.float32)
    return plain if scaling is None else scaling(plain)


class RotaryEmbedding(NamedTuple):
    """Cosine and sine of each token's angles, in float32."""

    cos: Float[Array, "*L f"]
    sin: Float[Array, "*L f"]


def rotary_embedding(
    positions: Int[Array | np.ndarray, "*L a"], axis_of: Int[np.ndarray, " f"], frequencies: Float[np.ndarray, " f"]
) -> RotaryEmbedding:
    """Return how much each frequency turns. ``axis_of`` [f] is the axis of ``positions`` that it turns with.

    A pass makes it once, before its layers: in a layer XLA fuses cosine and sine into the rotation, where each head
    computes them anew. On a CPU that takes several times as long as the rotation, and happens across layers too.
    """
    angles = jnp.asarray(positions)[..., axis_of].astype(jnp.float32) * frequencies

    def turned(angles):
        return RotaryEmbedding(jnp.cos(angles), jnp.sin(angles))

    def unturned(angles):
        return RotaryEmbedding(jnp.ones_like(angles), jnp.zeros_like(angles))

    if platforms.target_platform() != "cpu" or not isinstance(device_ops.current(), device_ops.LocalOps):
        return turned(angles)
    # XLA's CPU compiler fuses through its own optimization barriers, but not through a condition, on which several
    # devices would have to agree
    return jax.lax.cond((angles != 0).any(), turned, unturned, angles)


def rotate(x: Num[Array, "B S H D"], rotary: RotaryEmbedding) -> Num[Array, "B S H D"]:
    """Return the rotary embedding of ``x``, halves convention (D = 2f), computed in float32."""
    cos, sin = (part[:, :, None] for part in rotary)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)

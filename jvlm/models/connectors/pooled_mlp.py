"""Average pooling and an MLP: the plain connector of towers whose frames all have one size.

Axes: B rows, N frames of a row, h w places of a frame, d channels of the encoder, D width of the decoder.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jvlm.errors import UserError
from jvlm.models import layers
from jvlm.models.batch import PackedBatch
from jvlm.models.registry import ConnectorConfig, register


@dataclasses.dataclass(frozen=True)
class FrameGridConfig(ConnectorConfig):
    """Base of connectors that see each frame as a picture of ``grid`` x ``grid`` patches.

    Attributes:
      grid: patches along the side of a frame, as the encoder has them.
      class_token: whether the encoder puts its class token before each frame; it is dropped.
      out_grid: features along the side of a frame, 12 for 144.
    """

    grid: int = 48
    class_token: bool = True
    out_grid: int = 12

    def __post_init__(self):
        if not 1 <= self.out_grid <= self.grid:
            raise UserError(f"out_grid {self.out_grid} must be between 1 and grid {self.grid}")

    @property
    def frame_places(self) -> int:
        """Places of a frame in the batch's patches."""
        return self.grid**2 + self.class_token

    @property
    def frame_features(self) -> int:
        """Features of a frame."""
        return self.out_grid**2


def frames_of(features: Float[Array, "B P d"], config: FrameGridConfig) -> Float[Array, "B N h w d"]:
    """Features as pictures, without class tokens: frames have one size, so a row is cut where they begin."""
    B, P, d = features.shape
    frames = P // config.frame_places
    x = features[:, : frames * config.frame_places].reshape(B, frames, config.frame_places, d)
    return x[:, :, int(config.class_token) :].reshape(B, frames, config.grid, config.grid, d)


def pool_matrix(size: int, target: int) -> np.ndarray:
    """[target, size] float32: the means that adaptive average pooling takes along one side, as torch cuts them."""
    matrix = np.zeros((target, size), np.float32)
    for i in range(target):
        begin, end = i * size // target, -(-(i + 1) * size // target)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


def adaptive_average_pool(x: Float[Array, "*L h w d"], target: int) -> Float[Array, "*L t t d"]:
    """Mean over target x target areas, which overlap where the sizes do not divide. Computed in float32."""
    rows, columns = (pool_matrix(size, target) for size in x.shape[-3:-1])
    x32 = x.astype(jnp.float32)
    x32 = jnp.einsum("th,...hwd->...twd", rows, x32)
    return jnp.einsum("uw,...twd->...tud", columns, x32).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class PooledMLPConfig(FrameGridConfig):
    """``depth`` linear maps with ``activation`` between them, after the pooling."""

    depth: int = 2
    activation: layers.Activation = "gelu"


class Readout(nnx.Module):
    """Linear maps to the decoder's width, the first from another one, with an activation between them."""

    def __init__(
        self, d_in: int, d_out: int, depth: int, activation: str, *, precision: layers.Precision, rngs: nnx.Rngs
    ):
        self.activation = activation
        common = {"bias": True, "precision": precision, "rngs": rngs}
        self.maps = nnx.List(
            layers.Linear(d_out if i else d_in, d_out, ("mlp", "embed") if i else ("embed", "mlp"), **common)
            for i in range(depth)
        )

    def __call__(self, x: Float[Array, "*L d"]) -> Float[Array, "*L D"]:
        for number, linear in enumerate(self.maps):
            x = linear(layers.ACTIVATIONS[self.activation](x) if number else x)
        return x


@register(PooledMLPConfig)
class PooledMLP(nnx.Module):
    """Each frame's features, averaged to out_grid x out_grid, then mapped to the decoder's width."""

    def __init__(self, config: PooledMLPConfig, *, d_in: int, d_out: int, precision: layers.Precision, rngs: nnx.Rngs):
        self.config = config
        self.readout = Readout(d_in, d_out, config.depth, config.activation, precision=precision, rngs=rngs)

    def __call__(self, features: Float[Array, "B P d"], batch: PackedBatch) -> Float[Array, "B F D"]:
        """out_grid^2 features a frame, in rows from the top."""
        x = adaptive_average_pool(frames_of(features, self.config), self.config.out_grid)
        return self.readout(x.reshape(len(x), -1, x.shape[-1]))

"""Average pooling and an MLP: the plain connector of encoders whose images all have one size.

Axes: B sequences, N images of a sequence, h w rows and columns, d width of the encoder, D width of the decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jvlm.errors import UserError
from jvlm.models import layers
from jvlm.models.arithmetic import Counts, Product, Work
from jvlm.models.batch import PackedBatch
from jvlm.models.contracts import ConnectorConfig, VisionTokens, image_ids_of
from jvlm.models.registry import register


@dataclasses.dataclass(frozen=True)
class ImageGridConfig(ConnectorConfig):
    """Base of connectors for images of ``grid`` x ``grid`` patches.

    Attributes:
      grid: patches along the side of an image, as the encoder has them.
      class_token: whether the encoder puts a class token before each image; it is dropped.
      out_grid: vision tokens along the side of an image; 12 gives 144.
    """

    grid: int = 48
    class_token: bool = True
    out_grid: int = 12

    def __post_init__(self):
        if not 1 <= self.out_grid <= self.grid:
            raise UserError(f"out_grid {self.out_grid} must be between 1 and grid {self.grid}")

    @property
    def patches_per_image(self) -> int:
        """Patches of an image in the batch, with that of the class token."""
        return self.grid**2 + self.class_token

    @property
    def min_image_patches(self) -> int:
        return self.patches_per_image

    @property
    def tokens_per_image(self) -> int:
        """Vision tokens of an image."""
        return self.out_grid**2


def image_grids(vision: VisionTokens, config: ImageGridConfig) -> Float[Array, "B N h w d"]:
    """Return the tokens of the encoder as grids, without class tokens."""
    B, P, d = vision.tokens.shape
    images = P // config.patches_per_image
    x = vision.tokens[:, : images * config.patches_per_image].reshape(B, images, config.patches_per_image, d)
    return x[:, :, int(config.class_token) :].reshape(B, images, config.grid, config.grid, d)


def project_grids(
    projector: Callable[[Float[Array, "B F d"]], Float[Array, "B F D"]],
    grids: Float[Array, "B N t t d"],
    vision: VisionTokens,
) -> VisionTokens:
    """Return the projections of grids, row by row, as vision tokens; ``vision`` holds what the encoder returned."""
    B, N, t, _, d = grids.shape
    tokens = projector(grids.reshape(B, -1, d))
    return vision._replace(tokens=tokens, image_ids=image_ids_of(vision.image_ids, t * t, N))


def pool_matrix(size: int, target: int) -> Float[np.ndarray, "t s"]:
    """Return [target, size] float32: the means of adaptive average pooling along one side, cut as in torch."""
    matrix = np.zeros((target, size), np.float32)
    for i in range(target):
        begin, end = i * size // target, -(-(i + 1) * size // target)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


def adaptive_average_pool(x: Float[Array, "*L h w d"], target: int) -> Float[Array, "*L t t d"]:
    """Return means over target x target areas, which overlap where sizes do not divide. Computed in float32."""
    rows, columns = (pool_matrix(size, target) for size in x.shape[-3:-1])
    x32 = x.astype(jnp.float32)
    x32 = jnp.einsum("th,...hwd->...twd", rows, x32)
    return jnp.einsum("uw,...twd->...tud", columns, x32).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class PooledMLPConfig(ImageGridConfig, tag="pooled_mlp"):
    """Linear maps with activations between them, after the pooling.

    Attributes:
      depth: number of linear maps.
      activation: between the linear maps.
    """

    depth: int = 2
    activation: layers.Activation = "gelu"

    def work(self, counts: Counts, d_in: int, d_out: int) -> Work:
        """Return the arithmetic of a forward pass without the pooling, which is little beside the rest."""
        return Work(projector_products(counts.vision_tokens, d_in, d_out, self.depth))


def projector_products(uses: float | int, d_in: int, d_out: int, depth: int) -> tuple[Product, ...]:
    """Return the products of a `Projector`."""
    return tuple(Product(uses, d_out if i else d_in, d_out) for i in range(depth))


class Projector(nnx.Module):
    """Linear maps to the decoder's width with an activation between them."""

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
    """Average pooling of each image to out_grid x out_grid, then an MLP to the decoder's width."""

    def __init__(
        self,
        config: PooledMLPConfig,
        *,
        d_in: int,
        d_out: int,
        placeholders_per_image: int | None = None,
        precision: layers.Precision,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.projector = Projector(d_in, d_out, config.depth, config.activation, precision=precision, rngs=rngs)

    def __call__(self, vision: VisionTokens, batch: PackedBatch) -> VisionTokens:
        """Return out_grid^2 tokens for each image, row by row from the top."""
        x = adaptive_average_pool(image_grids(vision, self.config), self.config.out_grid)
        return project_grids(self.projector, x, vision)

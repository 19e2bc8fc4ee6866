"""C-Abstractor: regnet stages around an adaptive average pooling (Honeybee, arXiv 2312.06742), as MM1 and MM1.5 use it.

Source of the details: khanrc/honeybee's projectors and timm's RegStage (bottleneck ratio 1, depthwise 3 x 3,
squeeze-and-excitation 1/4, SiLU, LayerNorm over channels), written anew.

Axes: B sequences, N images, h w rows and columns, d width of the encoder, C width inside, D width of the decoder.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jvlm.models import device_ops, layers
from jvlm.models.arithmetic import Counts, Product, Work
from jvlm.models.batch import PackedBatch
from jvlm.models.connectors.pooled_mlp import (
    ImageGridConfig,
    Projector,
    adaptive_average_pool,
    image_grids,
    project_grids,
    projector_products,
)
from jvlm.models.contracts import VisionTokens
from jvlm.models.registry import register

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class CAbstractorConfig(ImageGridConfig, tag="c_abstractor"):
    """The defaults are Honeybee's, and MM1.5's 144 tokens of 48 x 48 patches; MM1.5 does not publish the rest.

    Attributes:
      hidden_size: width of the convolutions.
      depth: blocks of each of the two stages; with 0 there is only the pooling.
      projector_depth: linear maps to the decoder's width.
      positions: a trainable vector for each patch position, added before the first stage.
    """

    hidden_size: int = 1024
    depth: int = 3
    projector_depth: int = 2
    positions: bool = True

    def work(self, counts: Counts, d_in: int, d_out: int) -> Work:
        """Return the arithmetic of a forward pass without pooling and depthwise convolutions, which are little."""
        images, width = len(counts.images), self.hidden_size if self.depth else d_in
        products: list[Product] = []
        for stage, uses in enumerate((images * self.grid**2, counts.vision_tokens)):
            for i in range(self.depth):
                first = width if stage or i else d_in
                squeezed = _squeezed(first)
                products += [Product(uses, first, width), Product(uses, width, width)]
                products += [Product(images, width, squeezed), Product(images, squeezed, width)]
                products += [Product(uses, first, width)] if first != width else []
        return Work((*products, *projector_products(counts.vision_tokens, width, d_out, self.projector_depth)))


def _squeezed(width: int) -> int:
    """Return the channels inside a squeeze-and-excitation."""
    return round(width / 4)


class DepthwiseConv(nnx.Module):
    """3 x 3 convolution of each channel by itself, with zeros around the image."""

    def __init__(self, width: int, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.compute_dtype = precision.compute_dtype
        self.kernel = nnx.Param(precision.init_weight(rngs.params(), (9, width), 9), axes=("position", "mlp"))

    def __call__(self, x: Float[Array, "*L h w C"]) -> Float[Array, "*L h w C"]:
        dtype = jnp.dtype(self.compute_dtype)
        # on local shards: XLA's partitioner gets the kernel's gradient wrong where channels and images are split
        axes = (*("batch", "vision_tokens")[: x.ndim - 3], None, None, "mlp")
        operands = (x.astype(dtype), self.kernel[...].astype(dtype))
        return device_ops.current().shard_map_local(_convolve, operands, (axes, (None, "mlp")))


def _convolve(x: Float[Array, "*L h w C"], kernel: Float[Array, "9 C"]) -> Float[Array, "*L h w C"]:
    images, kernel = x.reshape(-1, *x.shape[-3:]), kernel.reshape(3, 3, 1, -1)
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": x.shape[-1]}
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", **layout).reshape(x.shape)


class RegBlock(nnx.Module):
    """1 x 1, depthwise 3 x 3, squeeze-and-excitation, 1 x 1, and the shortcut; a norm after each convolution."""

    def __init__(self, d_in: int, width: int, *, precision: layers.Precision, rngs: nnx.Rngs):
        common = {"precision": precision, "rngs": rngs}

        def norm() -> layers.LayerNorm:
            return layers.LayerNorm(width, _EPS, precision=precision)

        squeezed = _squeezed(d_in)
        self.conv1 = layers.Linear(d_in, width, ("embed", "mlp"), bias=False, **common)
        self.norm1 = norm()
        self.conv2 = DepthwiseConv(width, **common)
        self.norm2 = norm()
        self.squeeze = layers.Linear(width, squeezed, ("mlp", "embed"), bias=True, **common)
        self.excite = layers.Linear(squeezed, width, ("embed", "mlp"), bias=True, **common)
        self.conv3 = layers.Linear(width, width, ("mlp", "embed"), bias=False, **common)
        self.norm3 = norm()
        self.shortcut = layers.Linear(d_in, width, ("embed", "mlp"), bias=False, **common) if d_in != width else None
        self.shortcut_norm = norm() if d_in != width else None

    def __call__(self, x: Float[Array, "*L h w d"]) -> Float[Array, "*L h w C"]:
        y = jax.nn.silu(self.norm1(self.conv1(x)))
        y = jax.nn.silu(self.norm2(self.conv2(y)))
        mean = y.astype(jnp.float32).mean((-3, -2), keepdims=True).astype(y.dtype)
        y = y * jax.nn.sigmoid(self.excite(jax.nn.silu(self.squeeze(mean))))
        y = self.norm3(self.conv3(y))
        return jax.nn.silu(y + (x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))))


@register(CAbstractorConfig)
class CAbstractor(nnx.Module):
    """Position vectors, a regnet stage, pooling to out_grid x out_grid, another stage, and a projector."""

    def __init__(
        self,
        config: CAbstractorConfig,
        *,
        d_in: int,
        d_out: int,
        placeholders_per_image: int | None = None,
        precision: layers.Precision,
        rngs: nnx.Rngs,
    ):
        self.config = config
        common = {"precision": precision, "rngs": rngs}
        width = config.hidden_size if config.depth else d_in
        table = precision.init_weight(rngs.params(), (config.grid**2, d_in), d_in) if config.positions else None
        self.positions = None if table is None else nnx.Param(table, axes=("position", "embed"))
        self.stage1 = nnx.List(RegBlock(width if i else d_in, width, **common) for i in range(config.depth))
        self.stage2 = nnx.List(RegBlock(width, width, **common) for _ in range(config.depth))
        self.projector = Projector(width, d_out, config.projector_depth, "silu", **common)

    def __call__(self, vision: VisionTokens, batch: PackedBatch) -> VisionTokens:
        """Return out_grid^2 tokens for each image, row by row from the top."""
        config = self.config
        x = image_grids(vision, config)
        if self.positions is not None:
            x = x + self.positions[...].reshape(config.grid, config.grid, -1).astype(x.dtype)
        for block in self.stage1:
            x = block(x)
        x = adaptive_average_pool(x, config.out_grid)
        for block in self.stage2:
            x = block(x)
        return project_grids(self.projector, x, vision)

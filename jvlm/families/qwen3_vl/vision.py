"""The vision tower of Qwen3-VL and its mergers.

Source: Qwen3-VL technical report (arXiv 2511.21631), DeepStack (arXiv 2406.04334) and the public Hugging Face
implementation.
Axes: B sequences, P patches, D width, n DeepStack levels, g side of the position table.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jvlm.errors import UserError
from jvlm.models import device_ops, layers
from jvlm.models.arithmetic import Counts, Product, Work
from jvlm.models.batch import PackedBatch
from jvlm.models.connectors.patch_merger import Merger
from jvlm.models.contracts import ConnectorConfig, VisionTokens
from jvlm.models.encoders.native_vit import NativeViTBlock, NativeViTConfig, rotary_of_patches
from jvlm.models.layer_stack import LayerStack, PerLayer
from jvlm.models.registry import register


@dataclasses.dataclass(frozen=True)
class Qwen3ViTConfig(NativeViTConfig, tag="qwen3_vit"):
    """Fields as in Hugging Face's ``vision_config``; the defaults are those of Qwen3-VL-8B and the larger models.

    Attributes:
      position_grid: side of the table of learned positions, which is interpolated to the size of each image.
      deepstack_layers: layers, from 0, whose hidden states enter the decoder's first layers.
    """

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    patch_size: int = 16
    position_grid: int = 48
    deepstack_layers: tuple[int, ...] = (8, 16, 24)
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        super().__post_init__()
        levels = self.deepstack_layers
        if list(levels) != sorted(set(levels)) or any(not 0 <= i < self.depth for i in levels):
            raise UserError(f"deepstack_layers {levels} must be ascending layers of a depth of {self.depth}")

    @property
    def position_values(self) -> int:
        """Row and column of a patch, and height and width of its image, in patches."""
        return 4


@register(Qwen3ViTConfig)
class Qwen3ViT(nnx.Module):
    """Patches of images and video frames of any size to one token for each patch, with those of some layers."""

    def __init__(self, config: Qwen3ViTConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        D = config.hidden_size
        self.patch_embed = layers.Linear(
            config.patch_values, D, ("patch", "embed"), bias=True, precision=precision, rngs=rngs
        )
        table = precision.init_weight(rngs.params(), (config.position_grid**2, D), D)
        self.positions = nnx.Param(table, axes=("position", "embed"))
        self.blocks = LayerStack(
            lambda r: NativeViTBlock(config, "gelu_tanh", precision=precision, rngs=r), config.depth, rngs=rngs
        )

    def __call__(self, batch: PackedBatch) -> VisionTokens:
        """Return a token for each patch, in the order of the batch, and as many of each DeepStack level."""
        config, positions = self.config, jnp.asarray(batch.patch_positions)
        x_BPD = self.patch_embed(layers.normalise_pixels(batch.patches, config.image_mean, config.image_std))
        x_BPD = x_BPD + self._learned_positions(positions).astype(x_BPD.dtype)
        rotary = rotary_of_patches(config, positions[..., :2])
        # each layer writes into a slot: its level's, or else the last one, which nobody reads
        n = len(config.deepstack_layers)
        slots = np.full(config.depth, n, np.int32)
        slots[list(config.deepstack_layers)] = np.arange(n)

        def body(block: NativeViTBlock, carry, slot):
            x, levels = carry
            x = block(x, rotary, batch)
            return (x, jax.lax.dynamic_update_index_in_dim(levels, x, slot, 0)), None

        levels = jnp.zeros((n + 1, *x_BPD.shape), x_BPD.dtype)
        levels = device_ops.current().constrain(levels, (None, "batch", "patches", None))
        (x_BPD, levels), _ = self.blocks(body, (x_BPD, levels), slots, remat=self.precision.remat)
        return VisionTokens(x_BPD, jnp.asarray(batch.patch_segment_ids), tuple(levels[i] for i in range(n)))

    def _learned_positions(self, positions: Int[Array, "B P 4"]) -> Float[Array, "B P D"]:
        """Return the table, interpolated bilinearly so that its corners are those of the image, at each patch."""
        g = self.config.position_grid
        steps = jnp.maximum(positions[..., 2:] - 1, 1).astype(jnp.float32)
        at = positions[..., :2].astype(jnp.float32) * ((g - 1) / steps)
        # weight of each row and of each column of the table
        rows, columns = (jnp.maximum(0, 1 - jnp.abs(at[..., axis, None] - np.arange(g))) for axis in (0, 1))
        weights = (rows[..., :, None] * columns[..., None, :]).reshape(*at.shape[:2], g * g)
        table = device_ops.current().all_gather_param(self.positions[...].astype(jnp.float32), ("position", "embed"))
        return jnp.matmul(weights, table, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class DeepStackMergerConfig(ConnectorConfig, tag="deepstack_merger"):
    """Neighbouring patches become one vision token, and one more of each DeepStack level.

    Attributes:
      merge: patches along the side of the square that becomes one token.
      levels: number of DeepStack levels.
    """

    merge: int = 2
    levels: int = 3

    @property
    def patches_per_token(self) -> int:
        """Patches that become one vision token."""
        return self.merge**2

    def work(self, counts: Counts, d_in: int, d_out: int) -> Work:
        """Return the arithmetic of a forward pass; nothing is an entry: the norm before the products is trained too."""
        uses, width = counts.vision_tokens * (1 + self.levels), d_in * self.merge**2
        return Work((Product(uses, width, width), Product(uses, width, d_out)))


@register(DeepStackMergerConfig)
class DeepStackMerger(nnx.Module):
    """A merger of the last hidden states, and one of each DeepStack level."""

    def __init__(
        self,
        config: DeepStackMergerConfig,
        *,
        d_in: int,
        d_out: int,
        placeholders_per_image: int | None = None,
        precision: layers.Precision,
        rngs: nnx.Rngs,
    ):
        self.config = config
        sizes, same = (config.merge**2, d_in, d_out), {"norm": "layer", "precision": precision}
        self.merger = Merger(*sizes, **same, rngs=rngs)
        self.deepstack = LayerStack(
            lambda r: Merger(*sizes, **same, norm_joined=True, rngs=r), config.levels, rngs=rngs
        )

    def __call__(self, vision: VisionTokens, batch: PackedBatch) -> VisionTokens:
        """Return one token for each group of neighbouring patches, which the batch holds side by side."""
        if len(vision.deepstack) != self.config.levels:
            raise ValueError(f"{len(vision.deepstack)} DeepStack levels for {self.config.levels} mergers")
        _, merged = self.deepstack(
            lambda merger, carry, x: (carry, merger.joined(x)), None, PerLayer.of(vision.deepstack), remat="none"
        )
        ids = vision.image_ids[:, :: self.merger.group]
        return VisionTokens(self.merger.joined(vision.tokens), ids, tuple(merged))

"""The encoder: a configuration that declares what the assembly and the planner ask, and the module that it builds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jvlm.models import layers
from jvlm.models.arithmetic import Counts, Product, Work
from jvlm.models.batch import PackedBatch
from jvlm.models.contracts import EncoderConfig, VisionTokens
from jvlm.models.registry import register


@dataclasses.dataclass(frozen=True)
class ToyEncoderConfig(EncoderConfig, tag="toy_vlm"):
    """Two maps of each patch; ``image_mean`` and ``image_std`` are of pixels between 0 and 1."""

    hidden_size: int = 32
    patch_size: int = 14
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def patch_values(self) -> int:
        """Numbers in a flattened patch, in the order channel, y, x."""
        return 3 * self.patch_size**2

    def work(self, counts: Counts) -> Work:
        """Return the arithmetic of a forward pass."""
        D, patches = self.hidden_size, counts.patches
        return Work((Product(patches, self.patch_values, D, entry=True), Product(patches, D, D)))


@register(ToyEncoderConfig)
class ToyEncoder(nnx.Module):
    """Linear, GELU, Linear. The axes' names say how parameters are split over a mesh."""

    def __init__(self, config: ToyEncoderConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.config, common = config, {"precision": precision, "rngs": rngs}
        self.patch_embed = layers.Linear(
            config.patch_values, config.hidden_size, ("patch", "embed"), bias=True, **common
        )
        self.mix = layers.Linear(config.hidden_size, config.hidden_size, ("embed", "mlp"), bias=False, **common)

    def __call__(self, batch: PackedBatch) -> VisionTokens:
        """Return a token for each patch."""
        pixels = layers.normalise_pixels(batch.patches, self.config.image_mean, self.config.image_std)
        tokens = self.mix(jax.nn.gelu(self.patch_embed(pixels)))
        return VisionTokens(tokens, jnp.asarray(batch.patch_segment_ids))

"""The vision tower of Qwen2-VL.

Source: Qwen2-VL technical report (arXiv 2409.12191) and the public Hugging Face implementation.
Axes: B sequences, P patches, D width.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from jvlm.models import layers
from jvlm.models.batch import PackedBatch
from jvlm.models.contracts import VisionTokens
from jvlm.models.encoders.native_vit import NativeViTBlock, NativeViTConfig, rotary_of_patches
from jvlm.models.layer_stack import LayerStack
from jvlm.models.registry import register


@dataclasses.dataclass(frozen=True)
class Qwen2ViTConfig(NativeViTConfig, tag="qwen2_vit"):
    """The defaults are those of every released size; ``intermediate_size`` is 4 times ``hidden_size``."""


@register(Qwen2ViTConfig)
class Qwen2ViT(nnx.Module):
    """Patches of images and video frames of any size to one token for each patch; all layers attend to whole images."""

    def __init__(self, config: Qwen2ViTConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        self.patch_embed = layers.Linear(
            config.patch_values, config.hidden_size, ("patch", "embed"), bias=False, precision=precision, rngs=rngs
        )
        self.blocks = LayerStack(
            lambda r: NativeViTBlock(config, "quick_gelu", precision=precision, rngs=r), config.depth, rngs=rngs
        )

    def __call__(self, batch: PackedBatch) -> VisionTokens:
        """Return a token for each patch, in the order of the batch."""
        config = self.config
        x_BPD = self.patch_embed(layers.normalise_pixels(batch.patches, config.image_mean, config.image_std))
        rotary = rotary_of_patches(config, batch.patch_positions)
        x_BPD, _ = self.blocks(lambda block, x, _: (block(x, rotary, batch), None), x_BPD, remat=self.precision.remat)
        return VisionTokens(x_BPD, jnp.asarray(batch.patch_segment_ids))

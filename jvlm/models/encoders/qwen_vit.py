"""The native-resolution vision tower of Qwen2.5-VL and MiMo-VL.

Source: Qwen2.5-VL technical report (arXiv 2502.13923) and the public Hugging Face implementation.
Axes: B sequences, P patches, D width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jvlm.errors import UserError
from jvlm.models import layers
from jvlm.models.arithmetic import Counts, Product, Work, attention_flops, attention_products, squares, swiglu_products
from jvlm.models.attention import Attention
from jvlm.models.batch import PackedBatch
from jvlm.models.contracts import EncoderConfig, VisionTokens
from jvlm.models.layer_stack import LayerStack
from jvlm.models.registry import register


@dataclasses.dataclass(frozen=True)
class QwenViTConfig(EncoderConfig, tag="qwen_vit"):
    """Fields as in Hugging Face's ``vision_config``; the defaults are Qwen2.5-VL's.

    Attributes:
      depth: number of layers.
      hidden_size: width of the hidden states.
      num_heads: attention heads of a layer.
      intermediate_size: width inside the MLPs.
      in_channels: colours of a pixel.
      patch_size: pixels along the side of a patch.
      temporal_patch_size: video frames in a patch; an image is repeated.
      spatial_merge_size: patches along the side of the square that becomes one vision token.
      window_size: pixels along the side of an attention window.
      fullatt_block_indexes: layers in which patches attend to their whole image, not to their window alone.
      tokens_per_second: temporal position ids of a second of video.
      image_mean: of each colour, subtracted from pixels between 0 and 1.
      image_std: of each colour, which pixels are then divided by.
    """

    depth: int = 32
    hidden_size: int = 1280
    num_heads: int = 16
    intermediate_size: int = 3420
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: int = 2
    image_mean: tuple[float, ...] = layers.CLIP_MEAN
    image_std: tuple[float, ...] = layers.CLIP_STD

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise UserError(f"hidden_size {self.hidden_size} must be a multiple of 4 x num_heads {self.num_heads}")
        unit = self.patch_size * self.spatial_merge_size
        if self.window_size % unit:
            raise UserError(f"window_size {self.window_size} must be a multiple of patch x merge = {unit}")
        if any(not 0 <= i < self.depth for i in self.fullatt_block_indexes):
            raise UserError(f"fullatt_block_indexes {self.fullatt_block_indexes} outside depth {self.depth}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers in a flattened patch, in the order channel, frame, y, x."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    def work(self, counts: Counts) -> Work:
        """Return the arithmetic of a forward pass: most layers attend within windows."""
        D, uses = self.hidden_size, counts.patches * self.depth
        full = len(set(self.fullatt_block_indexes))
        pairs = full * squares(counts.images) + (self.depth - full) * squares(counts.windows)
        products = (
            Product(counts.patches, self.patch_values, D, entry=True),
            *attention_products(uses, D, D, D),
            *swiglu_products(uses, D, self.intermediate_size),
        )
        return Work(products, attention_flops(pairs, D))

    def branch_frequency(self) -> dict[str, float]:
        """Return how often layers attend to the whole image, and to windows."""
        full = len(self.fullatt_block_indexes) / self.depth
        return {"attention/cond/branch_1_fun": full, "attention/cond/branch_0_fun": 1 - full}

    @property
    def window_patches(self) -> int:
        """Patches in a whole attention window."""
        return (self.window_size // self.patch_size) ** 2


class VisionBlock(nnx.Module):
    """Pre-norm block: windowed or full attention, then SwiGLU."""

    def __init__(self, config: QwenViTConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        D, common = config.hidden_size, {"precision": precision, "rngs": rngs}
        self.window_patches = config.window_patches
        self.norm1 = layers.RMSNorm(D, 1e-6, precision=precision)
        self.attention = Attention(
            D, config.num_heads, qkv_bias=True, out_bias=True, fused_qkv=True, along="patches", **common
        )
        self.norm2 = layers.RMSNorm(D, 1e-6, precision=precision)
        self.mlp = layers.SwiGLU(D, config.intermediate_size, bias=True, **common)

    def __call__(self, x_BPD, angles, is_full, batch: PackedBatch):
        """``is_full``: 1 to attend within the image, 0 within the window; a numpy integer, or traced inside a scan."""
        x_BPD = x_BPD + self._mix(self.norm1(x_BPD), angles, is_full, batch)
        return x_BPD + self.mlp(self.norm2(x_BPD))

    @jax.named_scope("attention")
    def _mix(self, x_BPD, angles, is_full, batch: PackedBatch):
        q, k, v = self.attention.project(x_BPD, angles=angles)

        def within(segments, max_length: int | None):
            segments = jnp.asarray(segments)
            return lambda q, k, v: self.attention.attend(q, k, v, segments, segments, max_segment_length=max_length)

        windows = within(batch.patch_window_ids, self.window_patches)
        images = within(batch.patch_segment_ids, batch.max_image_patches)
        if isinstance(is_full, np.integer):
            mixed = (windows, images)[is_full](q, k, v)
        else:
            # chosen by number: XLA's partitioner loses, on GPUs, how the results of a choice by a bool are split
            mixed = jax.lax.switch(is_full, (windows, images), q, k, v)
        return self.attention.combine(mixed)


@register(QwenViTConfig)
class QwenViT(nnx.Module):
    """Patches of images and video frames of any size to one token for each patch.

    The family's image processor delivers patches in window order, so that both kinds of attention see contiguous
    segments and nothing is permuted here.
    """

    def __init__(self, config: QwenViTConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        common = {"precision": precision, "rngs": rngs}
        self.patch_embed = layers.Linear(
            config.patch_values, config.hidden_size, ("patch", "embed"), bias=False, **common
        )
        self.blocks = LayerStack(lambda r: VisionBlock(config, precision=precision, rngs=r), config.depth, rngs=rngs)

    def __call__(self, batch: PackedBatch) -> VisionTokens:
        """Return a token for each patch, in the order of the batch."""
        config = self.config
        x_BPD = self.patch_embed(layers.normalise_pixels(batch.patches, config.image_mean, config.image_std))
        frequencies = layers.rotary_frequencies(config.head_dim // 2, 10000.0)
        axis_of = np.repeat([0, 1], len(frequencies))
        angles = layers.rotary_angles(batch.patch_positions, axis_of, np.tile(frequencies, 2))
        is_full = np.array([i in config.fullatt_block_indexes for i in range(config.depth)], np.int32)
        x_BPD, _ = self.blocks(
            lambda block, x, is_full: (block(x, angles, is_full, batch), None),
            x_BPD,
            is_full,
            remat=self.precision.remat,
        )
        return VisionTokens(x_BPD, jnp.asarray(batch.patch_segment_ids))

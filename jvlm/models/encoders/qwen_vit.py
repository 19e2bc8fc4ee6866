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
from jvlm.models.contracts import VisionTokens
from jvlm.models.encoders.native_vit import EPS, NativeViTConfig, rotary_of_patches
from jvlm.models.layer_stack import LayerStack
from jvlm.models.registry import register


@dataclasses.dataclass(frozen=True)
class QwenViTConfig(NativeViTConfig, tag="qwen_vit"):
    """Fields as in Hugging Face's ``vision_config``; the defaults are Qwen2.5-VL's.

    Attributes:
      window_size: pixels along the side of an attention window.
      fullatt_block_indexes: layers in which patches attend to their whole image, not to their window alone.
      tokens_per_second: temporal position ids of a second of video.
    """

    intermediate_size: int = 3420
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: int = 2

    def __post_init__(self):
        super().__post_init__()
        unit = self.patch_size * self.spatial_merge_size
        if self.window_size % unit:
            raise UserError(f"window_size {self.window_size} must be a multiple of patch x merge = {unit}")
        if any(not 0 <= i < self.depth for i in self.fullatt_block_indexes):
            raise UserError(f"fullatt_block_indexes {self.fullatt_block_indexes} outside depth {self.depth}")

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
        self.norm1 = layers.RMSNorm(D, EPS, precision=precision)
        self.attention = Attention(
            D, config.num_heads, qkv_bias=True, out_bias=True, fused_qkv=True, along="patches", **common
        )
        self.norm2 = layers.RMSNorm(D, EPS, precision=precision)
        self.mlp = layers.SwiGLU(D, config.intermediate_size, bias=True, **common)

    def __call__(self, x_BPD, rotary, is_full, batch: PackedBatch):
        """``is_full``: 1 to attend within the image, 0 within the window; a numpy integer, or traced inside a scan."""
        x_BPD = x_BPD + self._mix(self.norm1(x_BPD), rotary, is_full, batch)
        return x_BPD + self.mlp(self.norm2(x_BPD))

    @jax.named_scope("attention")
    def _mix(self, x_BPD, rotary, is_full, batch: PackedBatch):
        q, k, v = self.attention.project(x_BPD, rotary=rotary)

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
        rotary = rotary_of_patches(config, batch.patch_positions)
        is_full = np.array([i in config.fullatt_block_indexes for i in range(config.depth)], np.int32)
        x_BPD, _ = self.blocks(
            lambda block, x, is_full: (block(x, rotary, is_full, batch), None),
            x_BPD,
            is_full,
            remat=self.precision.remat,
        )
        return VisionTokens(x_BPD, jnp.asarray(batch.patch_segment_ids))

"""The native-resolution vision tower of Qwen2.5-VL and MiMo-VL.

Source: Qwen2.5-VL technical report (arXiv 2502.13923) and the public Hugging Face implementation.
Axes: B rows, P patches, c pixels of a patch, D width, H heads, K head size.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jvlm.errors import UserError
from jvlm.models import device_ops, layers
from jvlm.models.batch import PackedBatch
from jvlm.models.registry import EncoderConfig, register


@dataclasses.dataclass(frozen=True)
class QwenViTConfig(EncoderConfig):
    """Fields as in Hugging Face's ``vision_config``; sizes in pixels, patches or channels."""

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
        """Pixels of one flattened patch, in the order channel, frame, y, x."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """Patches in a whole attention window."""
        return (self.window_size // self.patch_size) ** 2


class VisionAttention(nnx.Module):
    def __init__(self, config: QwenViTConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        D = config.hidden_size
        self.heads, self.head_dim, self.window_patches = config.num_heads, config.head_dim, config.window_patches
        self.implementation = precision.attention
        # head by head, so that a part of the outputs is whole heads
        self.qkv_by_head = layers.Linear(D, 3 * D, ("embed", "heads"), bias=True, precision=precision, rngs=rngs)
        self.out = layers.Linear(D, D, ("heads", "embed"), bias=True, precision=precision, rngs=rngs)

    @jax.named_scope("attention")
    def __call__(self, x_BPD, angles, is_full, batch: PackedBatch):
        """``is_full``: 1 to attend within the frame, 0 within the window; an int, or a traced one inside a scan."""
        qkv = self.qkv_by_head(x_BPD).reshape(*x_BPD.shape[:2], self.heads, 3, self.head_dim)
        q, k, v = (qkv[..., part, :] for part in range(3))
        q, k = layers.rotate(q, angles), layers.rotate(k, angles)

        def frames(q, k, v):
            return self._attend(q, k, v, batch.patch_segment_ids, batch.max_frame_patches)

        def windows(q, k, v):
            return self._attend(q, k, v, batch.patch_window_ids, self.window_patches)

        if isinstance(is_full, int):
            mixed = (windows, frames)[is_full](q, k, v)
        else:
            # chosen by number: XLA's partitioner loses, on GPUs, how the results of a choice by a bool are split
            mixed = jax.lax.switch(is_full, (windows, frames), q, k, v)
        return self.out(mixed.reshape(x_BPD.shape))

    def _attend(self, q, k, v, segments, max_length: int | None):
        segments = jnp.asarray(segments)
        return device_ops.current().attention(
            q,
            k,
            v,
            segments,
            segments,
            along="patches",
            max_segment_length=max_length,
            implementation=self.implementation,
        )


class VisionBlock(nnx.Module):
    """Pre-norm block: windowed or full attention, then SwiGLU."""

    def __init__(self, config: QwenViTConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.norm1 = layers.RMSNorm(config.hidden_size, 1e-6, precision=precision)
        self.attention = VisionAttention(config, precision=precision, rngs=rngs)
        self.norm2 = layers.RMSNorm(config.hidden_size, 1e-6, precision=precision)
        self.mlp = layers.SwiGLU(
            config.hidden_size, config.intermediate_size, bias=True, precision=precision, rngs=rngs
        )


@register(QwenViTConfig)
class QwenViT(nnx.Module):
    """Patches of images and frames of any size to one feature per patch.

    The host delivers patches in window order (`jvlm.data.vision`), so that both kinds of attention see contiguous
    segments and nothing is permuted here.
    """

    def __init__(self, config: QwenViTConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.config = config
        self.precision = precision
        self.patch_embed = layers.Linear(
            config.patch_values, config.hidden_size, ("patch", "embed"), bias=False, precision=precision, rngs=rngs
        )
        self.blocks = layers.LayerStack(
            lambda r: VisionBlock(config, precision=precision, rngs=r), config.depth, rngs=rngs
        )

    def __call__(self, batch: PackedBatch) -> Float[Array, "B P D"]:
        """One feature per patch, in the order of the batch."""
        config = self.config
        x_BPD = self.patch_embed(layers.normalise_pixels(batch.patches, config.image_mean, config.image_std))
        frequencies = layers.rotary_frequencies(config.head_dim // 2, 10000.0)
        axis_of = np.repeat([0, 1], len(frequencies))
        angles = layers.rotary_angles(batch.patch_positions, axis_of, np.tile(frequencies, 2))

        def body(block, x, is_full):
            x = x + block.attention(block.norm1(x), angles, is_full, batch)
            return x + block.mlp(block.norm2(x)), None

        full = [int(i in config.fullatt_block_indexes) for i in range(config.depth)]
        if not layers.is_unstacked(nnx.state(self.blocks)):
            full = jnp.asarray(full)
        return self.blocks(body, x_BPD, full, remat=self.precision.remat)[0]

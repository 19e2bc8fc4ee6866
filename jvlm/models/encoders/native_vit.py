"""What vision towers of native resolution share: 2-D rotary embeddings, patches of several frames, patches that merge.

Source: Qwen2-VL (arXiv 2409.12191) and the public Hugging Face implementation.
Axes: B sequences, P patches, D width, f frequencies.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from jvlm.errors import UserError
from jvlm.models import layers
from jvlm.models.arithmetic import Counts, Work, plain_vit_work
from jvlm.models.attention import Attention
from jvlm.models.batch import PackedBatch
from jvlm.models.contracts import EncoderConfig

EPS = 1e-6  # of every norm of these towers
_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class NativeViTConfig(EncoderConfig):
    """Base of towers for images of any size. Fields as in Hugging Face's ``vision_config``.

    Attributes:
      depth: number of layers.
      hidden_size: width of the hidden states.
      num_heads: attention heads of a layer.
      intermediate_size: width inside the MLPs.
      in_channels: colours of a pixel.
      patch_size: pixels along the side of a patch.
      temporal_patch_size: video frames in a patch; an image is repeated.
      spatial_merge_size: patches along the side of the square that becomes one vision token.
      image_mean: of each colour, subtracted from pixels between 0 and 1.
      image_std: of each colour, which pixels are then divided by.
    """

    depth: int = 32
    hidden_size: int = 1280
    num_heads: int = 16
    intermediate_size: int = 5120
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    image_mean: tuple[float, ...] = layers.CLIP_MEAN
    image_std: tuple[float, ...] = layers.CLIP_STD

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise UserError(f"hidden_size {self.hidden_size} must be a multiple of 4 x num_heads {self.num_heads}")

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers in a flattened patch, in the order channel, frame, y, x."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    def work(self, counts: Counts) -> Work:
        """Return the arithmetic of a forward pass, where every layer attends to the whole image."""
        return plain_vit_work(
            counts,
            depth=self.depth,
            width=self.hidden_size,
            hidden=self.intermediate_size,
            patch_values=self.patch_values,
        )


def rotary_of_patches(config: NativeViTConfig, positions: Int[Array | np.ndarray, "B P 2"]) -> layers.RotaryEmbedding:
    """Return the rotary embedding of patches: half of the frequencies turn with the row, half with the column."""
    frequencies = layers.rotary_frequencies(config.head_dim // 2, _THETA)
    return layers.rotary_embedding(positions, np.repeat([0, 1], len(frequencies)), np.tile(frequencies, 2))


class NativeViTBlock(nnx.Module):
    """Pre-norm block: LayerNorm and attention within the image, LayerNorm and an MLP."""

    def __init__(
        self, config: NativeViTConfig, activation: layers.Activation, *, precision: layers.Precision, rngs: nnx.Rngs
    ):
        D, common = config.hidden_size, {"precision": precision, "rngs": rngs}
        self.norm1 = layers.LayerNorm(D, EPS, precision=precision)
        self.attention = Attention(
            D, config.num_heads, qkv_bias=True, out_bias=True, fused_qkv=True, along="patches", **common
        )
        self.norm2 = layers.LayerNorm(D, EPS, precision=precision)
        self.mlp = layers.MLP(D, config.intermediate_size, activation, **common)

    def __call__(self, x_BPD, rotary, batch: PackedBatch):
        segments = jnp.asarray(batch.patch_segment_ids)
        normed, most = self.norm1(x_BPD), batch.max_image_patches
        x_BPD = x_BPD + self.attention(normed, segments, rotary=rotary, max_segment_length=most)
        return x_BPD + self.mlp(self.norm2(x_BPD))

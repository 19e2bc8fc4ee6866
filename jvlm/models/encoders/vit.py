"""The plain vision transformer, packed: SigLIP, CLIP, DINOv2 and what else differs from them by a switch.

Images and crops of any sizes lie side by side in a sequence and attend within themselves; nothing is padded to the
largest. The host gives the row and column of the position table for each patch, in ``patch_positions``. With a class
token, the host puts a patch of zeros at the position (-1, -1) before each image, which the class token replaces.

Axes: B sequences, P patches, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jvlm.errors import UserError
from jvlm.models import device_ops, layers
from jvlm.models.arithmetic import Counts, Work, plain_vit_work
from jvlm.models.attention import Attention
from jvlm.models.batch import PackedBatch
from jvlm.models.contracts import EncoderConfig, VisionTokens
from jvlm.models.layer_stack import LayerStack
from jvlm.models.registry import register

CLASS_POSITION = (-1, -1)
_HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class ViTConfig(EncoderConfig, tag="vit"):
    """The defaults are SigLIP-SO400M's, as Idefics2 has it.

    Attributes:
      depth: number of layers.
      hidden_size: width of the hidden states.
      num_heads: attention heads of a layer.
      intermediate_size: width inside the MLPs.
      in_channels: colours of a pixel.
      patch_size: pixels along the side of a patch.
      grid: rows and columns of the position table.
      activation: of the MLPs.
      norm_eps: added to the variance in each LayerNorm.
      patch_bias: a bias on the patch embedding.
      class_token: a trainable token before each image, with a position of its own (the first of the table).
      norm_before: a LayerNorm after the embeddings (CLIP).
      layer_scale: a trainable factor for each channel of what a layer adds (DINOv2).
      norm_after: a LayerNorm after the last layer.
      image_mean: of each colour, subtracted from pixels between 0 and 1.
      image_std: of each colour, which pixels are then divided by.
    """

    depth: int = 27
    hidden_size: int = 1152
    num_heads: int = 16
    intermediate_size: int = 4304
    in_channels: int = 3
    patch_size: int = 14
    grid: int = 70
    activation: layers.Activation = "gelu_tanh"
    norm_eps: float = 1e-6
    patch_bias: bool = True
    class_token: bool = False
    norm_before: bool = False
    layer_scale: bool = False
    norm_after: bool = True
    image_mean: tuple[float, ...] = _HALF
    image_std: tuple[float, ...] = _HALF

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")

    @property
    def patch_values(self) -> int:
        """Numbers in a flattened patch, in the order channel, y, x."""
        return self.in_channels * self.patch_size**2

    def work(self, counts: Counts) -> Work:
        """Return the arithmetic of a forward pass."""
        return plain_vit_work(
            counts,
            depth=self.depth,
            width=self.hidden_size,
            hidden=self.intermediate_size,
            patch_values=self.patch_values,
        )


def clip_vit(**fields: Any) -> ViTConfig:
    """Return a ViT of CLIP's kind: class token, a norm before the layers and none after, quick GELU."""
    form = {
        "activation": "quick_gelu",
        "norm_eps": 1e-5,
        "patch_bias": False,
        "class_token": True,
        "norm_before": True,
        "norm_after": False,
        "image_mean": layers.CLIP_MEAN,
        "image_std": layers.CLIP_STD,
    }
    return ViTConfig(**{**form, **fields})


class ViTBlock(nnx.Module):
    """Pre-norm block: attention within the image, then a plain MLP."""

    def __init__(self, config: ViTConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        D = config.hidden_size
        self.norm1 = layers.LayerNorm(D, config.norm_eps, precision=precision)
        self.attention = Attention(
            D, config.num_heads, qkv_bias=True, out_bias=True, along="patches", precision=precision, rngs=rngs
        )
        self.norm2 = layers.LayerNorm(D, config.norm_eps, precision=precision)
        self.mlp = layers.MLP(D, config.intermediate_size, config.activation, precision=precision, rngs=rngs)
        scales = [nnx.Param(jnp.ones((D,), jnp.dtype(precision.param_dtype)), axes=("norm",)) for _ in range(2)]
        self.scale1, self.scale2 = scales if config.layer_scale else (None, None)

    def __call__(self, x_BPD, batch: PackedBatch):
        segments = jnp.asarray(batch.patch_segment_ids)
        mixed = self.attention(self.norm1(x_BPD), segments, max_segment_length=batch.max_image_patches)
        x_BPD = x_BPD + _scaled(mixed, self.scale1)
        return x_BPD + _scaled(self.mlp(self.norm2(x_BPD)), self.scale2)


def _scaled(x, scale: nnx.Param | None):
    return x if scale is None else x * scale[...].astype(x.dtype)


@register(ViTConfig)
class ViT(nnx.Module):
    """Patches of images and crops to one token for each patch, the class tokens among them."""

    def __init__(self, config: ViTConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        D, dtype = config.hidden_size, jnp.dtype(precision.param_dtype)
        self.patch_embed = layers.Linear(
            config.patch_values, D, ("patch", "embed"), bias=config.patch_bias, precision=precision, rngs=rngs
        )
        self.class_token = nnx.Param(jnp.zeros((D,), dtype), axes=("embed",)) if config.class_token else None
        table_size = config.grid**2 + config.class_token
        self.positions = nnx.Param(precision.init_weight(rngs.params(), (table_size, D), D), axes=("position", "embed"))
        norm = {"eps": config.norm_eps, "precision": precision}
        self.norm_before = layers.LayerNorm(D, **norm) if config.norm_before else None
        self.blocks = LayerStack(lambda r: ViTBlock(config, precision=precision, rngs=r), config.depth, rngs=rngs)
        self.norm_after = layers.LayerNorm(D, **norm) if config.norm_after else None

    def __call__(self, batch: PackedBatch) -> VisionTokens:
        """Return a token for each patch of the batch."""
        config = self.config
        x_BPD = self.patch_embed(layers.normalise_pixels(batch.patches, config.image_mean, config.image_std))
        position_BP2 = jnp.asarray(batch.patch_positions)
        index_BP = position_BP2[..., 0] * config.grid + position_BP2[..., 1]
        if self.class_token is not None:
            is_class = position_BP2[..., 0] < 0
            x_BPD = jnp.where(is_class[..., None], self.class_token[...].astype(x_BPD.dtype), x_BPD)
            index_BP = jnp.where(is_class, 0, index_BP + 1)
        x_BPD = x_BPD + device_ops.current().embedding_lookup(
            self.positions[...], index_BP, x_BPD.dtype, axes=("position", "embed"), along="patches"
        )
        if self.norm_before is not None:
            x_BPD = self.norm_before(x_BPD)
        x_BPD, _ = self.blocks(lambda block, x, _: (block(x, batch), None), x_BPD, remat=self.precision.remat)
        x_BPD = x_BPD if self.norm_after is None else self.norm_after(x_BPD)
        return VisionTokens(x_BPD, jnp.asarray(batch.patch_segment_ids))

"""The plain vision transformer, packed: SigLIP, CLIP, DINOv2 and what else differs from them by a switch.

Images and crops of any sizes lie side by side in a row and attend within themselves; nothing is padded to the largest.
The host gives each patch its place in the position table, in ``patch_positions``. With a class token, the host puts a
patch of zeros at the place (-1, -1) before each frame, and the token takes its place.

Axes: B rows, P patches, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jvlm.errors import UserError
from jvlm.models import device_ops, layers
from jvlm.models.batch import PackedBatch
from jvlm.models.registry import EncoderConfig, register

CLASS_PLACE = (-1, -1)
_HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """The defaults are SigLIP-SO400M's, as Idefics2 has it.

    Attributes:
      grid: places of the position table along a side.
      class_token: a learnt token before each frame, with a place of its own in the table (the first).
      norm_before: a LayerNorm after the embeddings (CLIP).
      layer_scale: a learnt factor for each channel of what a layer adds (DINOv2).
      norm_after: a LayerNorm after the last layer.
      image_mean, image_std: of pixels between 0 and 1.
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
        """Pixels of one flattened patch, in the order channel, y, x."""
        return self.in_channels * self.patch_size**2


def clip_vit(**fields: Any) -> ViTConfig:
    """CLIP's form: class token, a norm before the layers and none after, quick GELU; ``fields`` give the sizes."""
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


class ViTAttention(nnx.Module):
    def __init__(self, config: ViTConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        D = config.hidden_size
        self.heads, self.implementation = config.num_heads, precision.attention
        common = {"bias": True, "precision": precision, "rngs": rngs}
        self.q = layers.Linear(D, D, ("embed", "heads"), **common)
        self.k = layers.Linear(D, D, ("embed", "heads"), **common)
        self.v = layers.Linear(D, D, ("embed", "heads"), **common)
        self.out = layers.Linear(D, D, ("heads", "embed"), **common)

    @jax.named_scope("attention")
    def __call__(self, x_BPD, batch: PackedBatch):
        B, P, _ = x_BPD.shape
        q, k, v = (part(x_BPD).reshape(B, P, self.heads, -1) for part in (self.q, self.k, self.v))
        segments = jnp.asarray(batch.patch_segment_ids)
        mixed = device_ops.current().attention(
            q,
            k,
            v,
            segments,
            segments,
            along="patches",
            max_segment_length=batch.max_frame_patches,
            implementation=self.implementation,
        )
        return self.out(mixed.reshape(B, P, -1))


class ViTBlock(nnx.Module):
    """Pre-norm block: attention within the frame, then a plain MLP."""

    def __init__(self, config: ViTConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        D = config.hidden_size
        self.norm1 = layers.LayerNorm(D, config.norm_eps, precision=precision)
        self.attention = ViTAttention(config, precision=precision, rngs=rngs)
        self.norm2 = layers.LayerNorm(D, config.norm_eps, precision=precision)
        self.mlp = layers.MLP(D, config.intermediate_size, config.activation, precision=precision, rngs=rngs)
        scales = [nnx.Param(jnp.ones((D,), jnp.dtype(precision.param_dtype)), axes=("norm",)) for _ in range(2)]
        self.scale1, self.scale2 = scales if config.layer_scale else (None, None)

    def __call__(self, x_BPD, batch: PackedBatch):
        x_BPD = x_BPD + _scaled(self.attention(self.norm1(x_BPD), batch), self.scale1)
        return x_BPD + _scaled(self.mlp(self.norm2(x_BPD)), self.scale2)


def _scaled(x, scale: nnx.Param | None):
    return x if scale is None else x * scale[...].astype(x.dtype)


@register(ViTConfig)
class ViT(nnx.Module):
    """Patches of images and crops to one feature per patch; the class token keeps its place among them."""

    def __init__(self, config: ViTConfig, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        D, dtype = config.hidden_size, jnp.dtype(precision.param_dtype)
        self.patch_embed = layers.Linear(
            config.patch_values, D, ("patch", "embed"), bias=config.patch_bias, precision=precision, rngs=rngs
        )
        self.class_token = nnx.Param(jnp.zeros((D,), dtype), axes=("embed",)) if config.class_token else None
        places = config.grid**2 + config.class_token
        self.positions = nnx.Param(precision.init_weight(rngs.params(), (places, D), D), axes=("position", "embed"))
        norm = {"eps": config.norm_eps, "precision": precision}
        self.norm_before = layers.LayerNorm(D, **norm) if config.norm_before else None
        self.blocks = layers.LayerStack(
            lambda r: ViTBlock(config, precision=precision, rngs=r), config.depth, rngs=rngs
        )
        self.norm_after = layers.LayerNorm(D, **norm) if config.norm_after else None

    def __call__(self, batch: PackedBatch) -> Float[Array, "B P D"]:
        """One feature for each place of the batch's patches."""
        config = self.config
        x_BPD = self.patch_embed(layers.normalise_pixels(batch.patches, config.image_mean, config.image_std))
        at_BP2 = jnp.asarray(batch.patch_positions)
        place_BP = at_BP2[..., 0] * config.grid + at_BP2[..., 1]
        if self.class_token is not None:
            is_class = at_BP2[..., 0] < 0
            x_BPD = jnp.where(is_class[..., None], self.class_token[...].astype(x_BPD.dtype), x_BPD)
            place_BP = jnp.where(is_class, 0, place_BP + 1)
        x_BPD = x_BPD + device_ops.current().embedding_lookup(
            self.positions[...], place_BP, x_BPD.dtype, axes=("position", "embed"), along="patches"
        )
        if self.norm_before is not None:
            x_BPD = self.norm_before(x_BPD)
        x_BPD, _ = self.blocks(
            lambda block, x, _: (block(x, batch), None),
            x_BPD,
            [None] * config.depth if layers.is_unstacked(nnx.state(self.blocks)) else None,
            remat=self.precision.remat,
        )
        return x_BPD if self.norm_after is None else self.norm_after(x_BPD)

"""Idefics2's connector: a gated MLP to the decoder's width, then a perceiver resampler (arXiv 2405.02246, A.1.3).

Axes: B sequences, P patches, N images that fit a sequence, n latents of an image, F = N n vision tokens, D width.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from jvlm.errors import UserError
from jvlm.models import layers
from jvlm.models.arithmetic import Counts, Work, attention_flops, attention_products, swiglu_products
from jvlm.models.attention import Attention
from jvlm.models.batch import PackedBatch
from jvlm.models.contracts import ConnectorConfig, VisionTokens, image_ids_of
from jvlm.models.layer_stack import LayerStack
from jvlm.models.registry import register


@dataclasses.dataclass(frozen=True)
class PerceiverConfig(ConnectorConfig, tag="perceiver"):
    """The defaults are Idefics2-8B's.

    Attributes:
      projection_size: width inside the gated MLP before the resampler.
      latents: vision tokens of an image, whatever its size.
      depth: layers of the resampler.
      num_heads: query heads of a layer.
      num_kv_heads: key and value heads of a layer.
      head_dim: size of a head.
      min_image_patches: no image has fewer patches. Sequences have room for as many images as fit both their tokens and
        their patches; with cross-attention an image takes one token only, so this number is the limit: give it, 729
        for sides of 378 pixels.
      norm_eps: of the resampler's norms. The released configuration does not have it: transformers used the text
        model's 1e-5 up to 4.47, and 1e-6 from 4.48 on.
    """

    projection_size: int = 14336
    latents: int = 64
    depth: int = 3
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 96
    min_image_patches: int = 1
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def tokens_per_image(self) -> int:
        """Vision tokens of an image."""
        return self.latents

    def work(self, counts: Counts, d_in: int, d_out: int) -> Work:
        """Return the arithmetic of a forward pass: latents attend to the patches of their image and to themselves."""
        latents = self.latents * len(counts.images)
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        keys = self.depth * (counts.patches + latents)
        products = (
            *swiglu_products(counts.patches, d_in, self.projection_size, d_out),
            *attention_products(self.depth * latents, d_out, q_width, kv_width, keys),
            *swiglu_products(self.depth * latents, d_out, 4 * d_out),
        )
        pairs = self.depth * self.latents * float((counts.images + self.latents).sum())
        return Work(products, attention_flops(pairs, q_width))


class PerceiverBlock(nnx.Module):
    """Pre-norm block over the latents, which read their image's patches and themselves.

    The patches come unchanged into every block, each of which norms them anew.
    """

    def __init__(self, config: PerceiverConfig, width: int, *, precision: layers.Precision, rngs: nnx.Rngs):
        norm = {"eps": config.norm_eps, "precision": precision}
        self.norm1 = layers.RMSNorm(width, **norm)
        self.norm_patches = layers.RMSNorm(width, **norm)
        self.attention = Attention(
            width,
            config.num_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_kv_heads,
            along="vision_tokens",
            precision=precision,
            rngs=rngs,
        )
        self.norm2 = layers.RMSNorm(width, **norm)
        self.mlp = layers.SwiGLU(width, 4 * width, bias=False, precision=precision, rngs=rngs)

    def __call__(self, latents_BFD, patches_BPD, latent_images, patch_images):
        patches_BPD, normed = self.norm_patches(patches_BPD), self.norm1(latents_BFD)
        context = jnp.concatenate([patches_BPD, normed], axis=1)
        context_images = jnp.concatenate([patch_images, latent_images], axis=1)
        latents_BFD = latents_BFD + self.attention(normed, latent_images, context=(context, context_images))
        return latents_BFD + self.mlp(self.norm2(latents_BFD))


@register(PerceiverConfig)
class Perceiver(nnx.Module):
    """``latents`` vision tokens for each image of a sequence, in the order of the images."""

    def __init__(
        self,
        config: PerceiverConfig,
        *,
        d_in: int,
        d_out: int,
        placeholders_per_image: int | None = None,
        precision: layers.Precision,
        rngs: nnx.Rngs,
    ):
        self.config, self.precision = config, precision
        self.placeholders_per_image = placeholders_per_image or config.latents
        common = {"precision": precision, "rngs": rngs}
        self.projection = layers.SwiGLU(d_in, config.projection_size, d_out=d_out, bias=False, **common)
        latents = precision.init_weight(rngs.params(), (config.latents, d_out), d_out)
        self.latents = nnx.Param(latents, axes=("position", "embed"))
        self.blocks = LayerStack(
            lambda r: PerceiverBlock(config, d_out, precision=precision, rngs=r), config.depth, rngs=rngs
        )
        self.norm = layers.RMSNorm(d_out, config.norm_eps, precision=precision)

    def __call__(self, vision: VisionTokens, batch: PackedBatch) -> VisionTokens:
        """Return tokens for as many images as a sequence has room for; those of images that it lacks mean nothing."""
        patches_BPD = self.projection(vision.tokens)
        B, N, n = len(patches_BPD), self.max_images(batch), self.config.latents
        latents = self.latents[...].astype(patches_BPD.dtype)
        latents_BFD = jnp.broadcast_to(jnp.tile(latents, (N, 1)), (B, N * n, latents.shape[-1]))
        image_ids = image_ids_of(vision.image_ids, n, N)
        latents_BFD, _ = self.blocks(
            lambda block, x, _: (block(x, patches_BPD, image_ids, vision.image_ids), None),
            latents_BFD,
            remat=self.precision.remat,
        )
        return vision._replace(tokens=self.norm(latents_BFD), image_ids=image_ids)

    def max_images(self, batch: PackedBatch) -> int:
        """Return how many images a sequence has room for, by its tokens and by its patches."""
        return batch.max_images(self.placeholders_per_image, self.config.min_image_patches)

"""Idefics2's connector: a gated MLP to the decoder's width, then a perceiver resampler (arXiv 2405.02246, A.1.3).

Axes: B rows, P patches, N frames that fit a row, n latents of a frame, F = N n features, D width, H and K heads.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jvlm.errors import UserError
from jvlm.models import device_ops, layers
from jvlm.models.batch import PackedBatch
from jvlm.models.registry import ConnectorConfig, register


@dataclasses.dataclass(frozen=True)
class PerceiverConfig(ConnectorConfig):
    """The defaults are Idefics2-8B's.

    Attributes:
      projection_size: width inside the gated MLP before the resampler.
      latents: features of a frame, whatever its size.
      min_frame_patches: no frame has fewer patches. With features among the tokens these say how many frames fit a row;
        where text reads them by cross-attention this must, so give the number: 729 for sides of 378 pixels.
      norm_eps: of the resampler's norms. The released configuration says nothing of it: transformers used the text
        model's 1e-5 up to 4.47, and 1e-6 from 4.48 on.
    """

    projection_size: int = 14336
    latents: int = 64
    depth: int = 3
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 96
    min_frame_patches: int = 1
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def frame_features(self) -> int:
        return self.latents


class PerceiverAttention(nnx.Module):
    """Each frame's latents read that frame's patches and themselves."""

    def __init__(self, config: PerceiverConfig, width: int, *, precision: layers.Precision, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.implementation = precision.attention
        common = {"bias": False, "precision": precision, "rngs": rngs}
        self.q = layers.Linear(width, self.heads * self.head_dim, ("embed", "heads"), **common)
        self.k = layers.Linear(width, self.kv_heads * self.head_dim, ("embed", "kv_heads"), **common)
        self.v = layers.Linear(width, self.kv_heads * self.head_dim, ("embed", "kv_heads"), **common)
        self.out = layers.Linear(self.heads * self.head_dim, width, ("heads", "embed"), **common)

    def __call__(self, latents_BFD, patches_BPD, latent_frames, patch_frames):
        B, F, _ = latents_BFD.shape
        seen = jnp.concatenate([patches_BPD, latents_BFD], axis=1)
        q = self.q(latents_BFD).reshape(B, F, self.heads, self.head_dim)
        k, v = (part(seen).reshape(B, seen.shape[1], self.kv_heads, self.head_dim) for part in (self.k, self.v))
        mixed = device_ops.current().attention(
            q,
            k,
            v,
            latent_frames,
            jnp.concatenate([patch_frames, latent_frames], axis=1),
            along="vision_tokens",
            implementation=self.implementation,
        )
        return self.out(mixed.reshape(B, F, -1))


class PerceiverBlock(nnx.Module):
    """Pre-norm block over the latents; the patches come unchanged into every block, through a norm of its own."""

    def __init__(self, config: PerceiverConfig, width: int, *, precision: layers.Precision, rngs: nnx.Rngs):
        norm = {"eps": config.norm_eps, "precision": precision}
        self.norm1 = layers.RMSNorm(width, **norm)
        self.norm_patches = layers.RMSNorm(width, **norm)
        self.attention = PerceiverAttention(config, width, precision=precision, rngs=rngs)
        self.norm2 = layers.RMSNorm(width, **norm)
        self.mlp = layers.SwiGLU(width, 4 * width, bias=False, precision=precision, rngs=rngs)

    def __call__(self, latents_BFD, patches_BPD, latent_frames, patch_frames):
        patches_BPD = self.norm_patches(patches_BPD)
        mixed = self.attention(self.norm1(latents_BFD), patches_BPD, latent_frames, patch_frames)
        latents_BFD = latents_BFD + mixed
        return latents_BFD + self.mlp(self.norm2(latents_BFD))


@register(PerceiverConfig)
class Perceiver(nnx.Module):
    """``latents`` features for each frame of the row, in the order of the frames."""

    def __init__(self, config: PerceiverConfig, *, d_in: int, d_out: int, precision: layers.Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        self.frame_tokens = config.latents  # fewer where text reads features by cross-attention
        common = {"precision": precision, "rngs": rngs}
        self.projection = layers.SwiGLU(d_in, config.projection_size, d_out=d_out, bias=False, **common)
        latents = precision.init_weight(rngs.params(), (config.latents, d_out), d_out)
        self.latents = nnx.Param(latents, axes=("position", "embed"))
        self.blocks = layers.LayerStack(
            lambda r: PerceiverBlock(config, d_out, precision=precision, rngs=r), config.depth, rngs=rngs
        )
        self.norm = layers.RMSNorm(d_out, config.norm_eps, precision=precision)

    def __call__(self, features: Float[Array, "B P d"], batch: PackedBatch) -> Float[Array, "B F D"]:
        """Features of every frame that the row has room for; those of frames that it does not have mean nothing."""
        frames = jnp.asarray(batch.patch_segment_ids)
        patches_BPD = self.projection(features)
        B, N, n = len(frames), self.most_frames(batch), self.config.latents
        latents = self.latents[...].astype(patches_BPD.dtype)
        latents_BFD = jnp.broadcast_to(jnp.tile(latents, (N, 1)), (B, N * n, latents.shape[-1]))
        latent_frames = frames_of_features(frames, n, N)
        latents_BFD, _ = self.blocks(
            lambda block, x, _: (block(x, patches_BPD, latent_frames, frames), None),
            latents_BFD,
            [None] * self.config.depth if layers.is_unstacked(nnx.state(self.blocks)) else None,
            remat=self.precision.remat,
        )
        return self.norm(latents_BFD)

    def most_frames(self, batch: PackedBatch) -> int:
        """Frames that a row has room for: by the tokens that each takes, and by its patches."""
        return batch.most_frames(self.frame_tokens, self.config.min_frame_patches)


def frames_of_features(patch_frames: Int[Array, "B P"], features: int, frames: int) -> Int[Array, "B F"]:
    """The frame of each feature where every frame has as many; 0 for frames that the row does not have."""
    ids = jnp.repeat(jnp.arange(1, frames + 1, dtype=patch_frames.dtype), features)
    return jnp.where(ids <= patch_frames.max(axis=1, keepdims=True), ids, 0)

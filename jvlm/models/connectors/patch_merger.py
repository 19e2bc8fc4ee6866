"""The 2 x 2 patch merger of Qwen2.5-VL: MiMo-VL's projector."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from jvlm.errors import UserError
from jvlm.models import layers
from jvlm.models.batch import PackedBatch
from jvlm.models.registry import ConnectorConfig, register


@dataclasses.dataclass(frozen=True)
class PatchMergerConfig(ConnectorConfig):
    """``merge`` x ``merge`` neighbouring patches become one feature."""

    merge: int = 2


@register(PatchMergerConfig)
class PatchMerger(nnx.Module):
    """RMSNorm per patch, join the neighbours, Linear, exact GELU, Linear."""

    def __init__(
        self, config: PatchMergerConfig, *, d_in: int, d_out: int, precision: layers.Precision, rngs: nnx.Rngs
    ):
        self.group = config.merge**2
        width = d_in * self.group
        self.norm = layers.RMSNorm(d_in, 1e-6, precision=precision)
        self.hidden = layers.Linear(width, width, ("embed", "mlp"), bias=True, precision=precision, rngs=rngs)
        self.out = layers.Linear(width, d_out, ("mlp", "embed"), bias=True, precision=precision, rngs=rngs)

    def __call__(self, features: Float[Array, "B P d"], batch: PackedBatch) -> Float[Array, "B F D"]:
        """One feature for each group of neighbouring patches, which the batch holds side by side."""
        B, P, d = features.shape
        if P % self.group:
            raise UserError(f"{P} patches a row are no multiple of {self.group}, which are joined: change row_patches")
        x = self.norm(features).reshape(B, P // self.group, d * self.group)
        return self.out(jax.nn.gelu(self.hidden(x), approximate=False))

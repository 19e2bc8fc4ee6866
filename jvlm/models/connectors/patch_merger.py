"""The 2 x 2 patch merger of Qwen2.5-VL: MiMo-VL's projector."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from jvlm.errors import UserError
from jvlm.models import layers
from jvlm.models.arithmetic import Counts, Product, Work
from jvlm.models.batch import PackedBatch
from jvlm.models.contracts import ConnectorConfig, VisionTokens
from jvlm.models.registry import register


@dataclasses.dataclass(frozen=True)
class PatchMergerConfig(ConnectorConfig, tag="patch_merger"):
    """Neighbouring patches become one vision token.

    Attributes:
      merge: patches along the side of the square that becomes one token.
    """

    merge: int = 2

    @property
    def patches_per_token(self) -> int:
        """Patches that become one vision token."""
        return self.merge**2

    def work(self, counts: Counts, d_in: int, d_out: int) -> Work:
        """Return the arithmetic of a forward pass; nothing is an entry: the norm before the products is trained too."""
        width = d_in * self.merge**2
        return Work((Product(counts.vision_tokens, width, width), Product(counts.vision_tokens, width, d_out)))


@register(PatchMergerConfig)
class PatchMerger(nnx.Module):
    """RMSNorm per patch, join the neighbours, Linear, exact GELU, Linear."""

    def __init__(
        self,
        config: PatchMergerConfig,
        *,
        d_in: int,
        d_out: int,
        placeholders_per_image: int | None = None,
        precision: layers.Precision,
        rngs: nnx.Rngs,
    ):
        self.group = config.merge**2
        width = d_in * self.group
        self.norm = layers.RMSNorm(d_in, 1e-6, precision=precision)
        self.hidden = layers.Linear(width, width, ("embed", "mlp"), bias=True, precision=precision, rngs=rngs)
        self.out = layers.Linear(width, d_out, ("mlp", "embed"), bias=True, precision=precision, rngs=rngs)

    def __call__(self, vision: VisionTokens, batch: PackedBatch) -> VisionTokens:
        """Return one token for each group of neighbouring patches, which the batch holds side by side."""
        B, P, d = vision.tokens.shape
        if P % self.group:
            raise UserError(
                f"{P} patches in a sequence are no multiple of {self.group}, which are merged: change max_patches"
            )
        x = self.norm(vision.tokens).reshape(B, P // self.group, d * self.group)
        tokens = self.out(jax.nn.gelu(self.hidden(x), approximate=False))
        return vision._replace(tokens=tokens, image_ids=vision.image_ids[:, :: self.group])

"""Mergers of neighbouring patches: that of Qwen2-VL, and of Qwen2.5-VL, which is MiMo-VL's projector.

Axes: B sequences, P patches, D width of a patch.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from flax import nnx

from jvlm.errors import UserError
from jvlm.models import layers
from jvlm.models.arithmetic import Counts, Product, Work
from jvlm.models.batch import PackedBatch
from jvlm.models.contracts import ConnectorConfig, VisionTokens
from jvlm.models.registry import register

Norm = Literal["rms", "layer"]
_EPS = 1e-6
_NORMS = {"rms": layers.RMSNorm, "layer": layers.LayerNorm}


@dataclasses.dataclass(frozen=True)
class PatchMergerConfig(ConnectorConfig, tag="patch_merger"):
    """Neighbouring patches become one vision token.

    Attributes:
      merge: patches along the side of the square that becomes one token.
      norm: of each patch, before they are joined: an RMSNorm (Qwen2.5-VL) or a LayerNorm (Qwen2-VL).
    """

    merge: int = 2
    norm: Norm = "rms"

    @property
    def patches_per_token(self) -> int:
        """Patches that become one vision token."""
        return self.merge**2

    def work(self, counts: Counts, d_in: int, d_out: int) -> Work:
        """Return the arithmetic of a forward pass; nothing is an entry: the norm before the products is trained too."""
        width = d_in * self.merge**2
        return Work((Product(counts.vision_tokens, width, width), Product(counts.vision_tokens, width, d_out)))


class Merger(nnx.Module):
    """A norm of each patch or of the joined neighbours, Linear, exact GELU, Linear."""

    def __init__(
        self,
        group: int,
        d_in: int,
        d_out: int,
        *,
        norm: Norm = "rms",
        norm_joined: bool = False,
        precision: layers.Precision,
        rngs: nnx.Rngs,
    ):
        width = d_in * group
        self.group, self.norm_joined = group, norm_joined
        self.norm = _NORMS[norm](width if norm_joined else d_in, _EPS, precision=precision)
        self.hidden = layers.Linear(width, width, ("embed", "mlp"), bias=True, precision=precision, rngs=rngs)
        self.out = layers.Linear(width, d_out, ("mlp", "embed"), bias=True, precision=precision, rngs=rngs)

    def joined(self, x_BPD):
        """Return one vector for each group of neighbouring patches, which lie side by side.

        Raises:
          UserError: patches that are not whole groups.
        """
        B, P, D = x_BPD.shape
        if P % self.group:
            raise UserError(
                f"{P} patches in a sequence are no multiple of {self.group}, which are merged: change max_patches"
            )
        joined = (B, P // self.group, D * self.group)
        x = self.norm(x_BPD.reshape(joined)) if self.norm_joined else self.norm(x_BPD).reshape(joined)
        return self.out(jax.nn.gelu(self.hidden(x), approximate=False))


@register(PatchMergerConfig)
class PatchMerger(Merger):
    """One merger of the last hidden states."""

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
        super().__init__(config.merge**2, d_in, d_out, norm=config.norm, precision=precision, rngs=rngs)

    def __call__(self, vision: VisionTokens, batch: PackedBatch) -> VisionTokens:
        """Return one token for each group of neighbouring patches."""
        return vision._replace(tokens=self.joined(vision.tokens), image_ids=vision.image_ids[:, :: self.group])

"""Pixel shuffle and one linear map: the connector of Idefics3 and SmolVLM.

Source: "Building and better understanding vision-language models" (arXiv 2408.12637), after InternVL 1.5
(arXiv 2404.16821), and the public Hugging Face implementation.
Axes: B sequences, N images of a sequence, t side of the tokens, f side of the square of patches of each, d width.
"""

from __future__ import annotations

import dataclasses

import einops
from flax import nnx

from jvlm.errors import UserError
from jvlm.models import layers
from jvlm.models.arithmetic import Counts, Product, Work
from jvlm.models.batch import PackedBatch
from jvlm.models.connectors.pooled_mlp import ImageGridConfig, image_grids, project_grids
from jvlm.models.contracts import VisionTokens
from jvlm.models.registry import register


@dataclasses.dataclass(frozen=True)
class PixelShuffleConfig(ImageGridConfig, tag="pixel_shuffle"):
    """Squares of neighbouring patches become one vision token each; the defaults are Idefics3-8B's."""

    grid: int = 26
    class_token: bool = False
    out_grid: int = 13

    def __post_init__(self):
        super().__post_init__()
        if self.grid % self.out_grid:
            raise UserError(f"grid {self.grid} must be a multiple of out_grid {self.out_grid}")

    @property
    def factor(self) -> int:
        """Patches along the side of the square that becomes one token (``scale_factor`` of config.json)."""
        return self.grid // self.out_grid

    def work(self, counts: Counts, d_in: int, d_out: int) -> Work:
        """Return the arithmetic of a forward pass."""
        return Work((Product(counts.vision_tokens, d_in * self.factor**2, d_out, entry=True),))


@register(PixelShuffleConfig)
class PixelShuffle(nnx.Module):
    """Joins the patches of each square, row by row, and maps them to the decoder's width."""

    def __init__(
        self,
        config: PixelShuffleConfig,
        *,
        d_in: int,
        d_out: int,
        placeholders_per_image: int | None = None,
        precision: layers.Precision,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.projection = layers.Linear(
            d_in * config.factor**2, d_out, ("mlp", "embed"), bias=False, precision=precision, rngs=rngs
        )

    def __call__(self, vision: VisionTokens, batch: PackedBatch) -> VisionTokens:
        """Return out_grid^2 tokens for each image, row by row from the top."""
        f = self.config.factor
        grids = image_grids(vision, self.config)
        squares = einops.rearrange(grids, "B N (t f) (u g) d -> B N t u (f g d)", f=f, g=f)
        return project_grids(self.projection, squares, vision)

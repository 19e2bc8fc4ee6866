"""Images of Idefics3: tiles of the encoder's size in rows and columns, and the whole image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jvlm.data.image_processor import ImageProcessorConfig, Limit, MediaPatches
from jvlm.errors import UserError
from jvlm.families.tile_images import TileProcessor
from jvlm.validation import check_fields

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig

FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
_MOST = 4096  # pixels along a side after the first resize
_TILES = 4  # along the longer side, where nothing else is said


@dataclasses.dataclass(frozen=True)
class Idefics3ImageConfig(ImageProcessorConfig, tag="idefics3"):
    """An image is resized to ``longest_edge``, smaller ones too, then to whole tiles, which come before the whole.

    Attributes:
      longest_edge: longer side in pixels after the first resize, at most 4,096; None is 4 tiles.
      tile: side of a tile in pixels; None is the encoder's, grid x patch_size.
      split: False takes the whole image alone, as one tile.
      resample: Pillow's number of the filter; 1 is Lanczos.
      resize: False leaves out the first resize.
    """

    limits: ClassVar[dict[str, Limit]] = {
        "longest_edge": Limit(most=_MOST, help="longer side of an image after resizing, at most"),
    }

    longest_edge: int | None = None
    tile: int | None = None
    split: bool = True
    resample: int = Image.Resampling.LANCZOS.value
    resize: bool = True

    def __post_init__(self):
        sides = dict.fromkeys(("longest_edge", "tile"), "[1, inf)")
        check_fields(self, "processor.image.", {**sides, "resample": "[0, 5]"})

    def build(self, model: VLMConfig) -> Idefics3ImageProcessor:
        """Return the image processor of a model."""
        return Idefics3ImageProcessor(model, self)


def longest_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """(height, width) with the longer side as given and the shorter one even, as transformers computes it."""
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > _MOST:
        width, height = _MOST, int(_MOST / aspect)
    elif height > width and height > _MOST:
        height, width = _MOST, int(_MOST * aspect)
    return max(height, 1), max(width, 1)


def whole_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """(height, width) as multiples of a tile, the longer side first."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = int(width / aspect)
    else:
        height = math.ceil(height / tile) * tile
        width = int(height * aspect)
    return math.ceil(height / tile) * tile, math.ceil(width / tile) * tile


class Idefics3ImageProcessor(TileProcessor):
    """Tiles behind their row and column, a line each row, and the whole image last."""

    delimiter_tokens = (FAKE,)

    def __init__(self, model: VLMConfig, config: Idefics3ImageConfig):
        super().__init__(model)
        self.tile = config.tile or self.side
        if self.tile // self.encoder.patch_size != self.encoder.grid:
            raise UserError(
                f"tiles of {self.tile} pixels hold {self.tile // self.encoder.patch_size} patches of "
                f"{self.encoder.patch_size} along a side, and the encoder takes {self.encoder.grid}: change "
                "processor.image.tile"
            )

    def image(self, image: Image.Image, config: Idefics3ImageConfig, *, index: int = 0, count: int = 1) -> MediaPatches:
        """Return the tiles and the whole of an image, or the whole alone."""
        return self._written(self.layout(image.size, config, index=index, count=count), self._tiles(image, config))

    def layout(
        self, size: tuple[int, int], config: Idefics3ImageConfig, *, index: int = 0, count: int = 1
    ) -> MediaPatches:
        """Return `image` of an image of (width, height), with patches whose values mean nothing."""
        _, (height, width) = self._sizes(size, config)
        rows, columns = self._grid(height, width)
        pattern: list[str | int] = []
        for row in range(rows):
            for column in range(columns):
                line = "\n" if row and not column else ""
                pattern += [f"{line}{FAKE}<row_{row + 1}_col_{column + 1}>", self.features]
        pattern += [("\n\n" if rows else "") + FAKE + GLOBAL, self.features, FAKE]
        return self._layout(rows * columns + 1, tuple(pattern), size, (width, height))

    def write(
        self,
        image: Image.Image,
        config: Idefics3ImageConfig,
        out: UInt8[np.ndarray, "n c"],
        *,
        index: int = 0,
        count: int = 1,
    ) -> None:
        """Write the patches of `image`."""
        self._write(self._tiles(image, config), out)

    def video(
        self, frames: Sequence[Image.Image], config: Idefics3ImageConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Return each frame as an image of its own, never split."""
        config = dataclasses.replace(config, split=False)
        pattern = (FAKE + GLOBAL, self.features, FAKE) * len(frames)
        media = self._layout(len(frames), pattern, frames[0].size, (self.tile, self.tile))
        return self._written(media, [tile for frame in frames for tile in self._tiles(frame, config)])

    def reductions(self, config: Idefics3ImageConfig) -> list[list[dict[str, Any]]]:
        """Shorter edges, a tile at a time, down to a single one; or the whole image alone."""
        if not config.resize or not config.split:
            return [[{"split": False}]] if config.split else []
        longest = min(config.longest_edge or _TILES * self.tile, _MOST)
        most = math.ceil(longest / self.tile) - 1
        return [[{"longest_edge": tiles * self.tile} for tiles in range(most, 0, -1)]]

    def _sizes(self, size: tuple[int, int], config: Idefics3ImageConfig) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of an image of (width, height) after the first resize, and after the second."""
        width, height = size
        if config.resize:
            height, width = longest_size(height, width, config.longest_edge or _TILES * self.tile)
        return (height, width), whole_tiles(height, width, self.tile) if config.split else (self.tile, self.tile)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles; none for what one tile holds."""
        rows, columns = height // self.tile, width // self.tile
        return (0, 0) if rows == columns == 1 else (rows, columns)

    def _tiles(self, image: Image.Image, config: Idefics3ImageConfig) -> list[Image.Image]:
        filter_, side = Image.Resampling(config.resample), self.tile
        for height, width in self._sizes(image.size, config):
            image = image if image.size == (width, height) else image.resize((width, height), filter_)
        rows, columns = self._grid(image.height, image.width)
        corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
        whole = image.resize((side, side), filter_) if corners else image
        return [*(image.crop((x, y, x + side, y + side)) for x, y in corners), whole]

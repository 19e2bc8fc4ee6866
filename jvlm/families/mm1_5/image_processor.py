"""Host side of towers that see images of one size only: MM1.5's tiles, a whole image, the frames of a video.

Every tile has as many patches as every other, so the tiles of a sequence are a plain array (`ImageGridConfig`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jvlm.data.image_processor import ImageProcessorConfig, Limit, MediaPatches
from jvlm.data.video.sampling import Sampling
from jvlm.errors import UserError
from jvlm.families.mm1_5 import tiles
from jvlm.families.tile_images import TileProcessor
from jvlm.validation import check_fields

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig


@dataclasses.dataclass(frozen=True)
class TiledImageConfig(ImageProcessorConfig, tag="tiled"):
    """How images become tiles; the defaults are MM1.5's final recipe. What is not published is an option.

    Attributes:
      splitting: "dynamic" chooses a grid of min_tiles to max_tiles for each image (see `tiles`), "static" always takes
        ``static_grid``, "none" takes the whole image as one tile.
      min_tiles: fewest tiles of an image that is split ("dynamic").
      max_tiles: most tiles of an image that is split ("dynamic").
      static_grid: rows and columns of every image's tiles ("static").
      split_below: images are split only in conversations with fewer images than this.
      overview: where the whole image comes as one more tile; an image of a single tile has none.
      whole_fit: the whole image is stretched to the square ("squash"), or keeps its aspect and is padded ("pad").
      indicator: what tells the model which tile it sees: an index before each, or separators between them.
      index: template of the index: image from 0, row and column from 1, or both 0 for an overview.
      separators: before an overview, between columns, between rows.
      max_upscale: see `jvlm.families.mm1_5.tiles.choose_grid`.
      placement: where an image that does not fill its grid lies on it.
      colour: of what it leaves empty.
      num_frames: of a video, spread evenly over the frames given; each is a whole image.
    """

    limits: ClassVar[dict[str, Limit]] = {
        "min_tiles": Limit(most=1024, at_most="max_tiles", help="fewest tiles of an image"),
        "max_tiles": Limit(most=1024, help="most tiles of an image"),
        "num_frames": Limit(help="frames taken of a video"),
    }

    splitting: Literal["dynamic", "static", "none"] = "dynamic"
    min_tiles: int = 4
    max_tiles: int = 9
    static_grid: tuple[int, int] = (2, 2)
    split_below: int = 3
    overview: Literal["last", "first", "none"] = "last"
    whole_fit: Literal["squash", "pad"] = "squash"
    indicator: Literal["index", "separator", "none"] = "index"
    index: str = "({image},{row},{column})"
    separators: tuple[str, str, str] = (":", ",", "\n")
    max_upscale: float | None = None
    placement: tiles.Placement = "corner"
    colour: tiles.Colour = (0, 0, 0)
    num_frames: int = 24

    def __post_init__(self):
        counts = dict.fromkeys(("min_tiles", "max_tiles", "split_below", "num_frames"), "[1, inf)")
        check_fields(self, "processor.image.", {**counts, "split_below": "[0, inf)", "max_upscale": "(0, inf)"})
        if not all(isinstance(count, int) and count > 0 for count in self.static_grid):
            raise UserError(f"processor.image.static_grid must be rows and columns, got {self.static_grid}")
        tiles.candidate_grids(self.min_tiles, self.max_tiles)  # refuses limits that contradict each other

    def sampling(self) -> Sampling:
        """Return as many frames as ``video`` takes, spread evenly; of a short video all."""
        return Sampling(fps=1000.0, min_frames=2, max_frames=max(self.num_frames, 2), rule="numbers")

    def build(self, model: VLMConfig) -> TiledImageProcessor:
        """Return the image processor of a model."""
        return TiledImageProcessor(model)

    def grid_of(self, size: tuple[int, int], side: int, count: int) -> tiles.Grid:
        """(rows, columns) of one of ``count`` images, of (height, width) pixels, in tiles of ``side`` pixels."""
        if self.splitting == "none" or count >= self.split_below:
            return (1, 1)
        if self.splitting == "static":
            return self.static_grid
        grids = tiles.candidate_grids(self.min_tiles, self.max_tiles)
        return tiles.choose_grid(size, side, grids, self.max_upscale)


class TiledImageProcessor(TileProcessor):
    """Turns images and frame lists into tiles of the encoder's size."""

    def image(self, image: Image.Image, config: TiledImageConfig, *, index: int = 0, count: int = 1) -> MediaPatches:
        """Return the tiles and the overview of an image, or the whole image as one tile."""
        media = self.layout(image.size, config, index=index, count=count)
        return self._written(media, self._tiles(image, config, count))

    def layout(
        self, size: tuple[int, int], config: TiledImageConfig, *, index: int = 0, count: int = 1
    ) -> MediaPatches:
        """Return `image` of an image of (width, height), with patches whose values mean nothing."""
        grid = config.grid_of(size[::-1], self.side, count)
        if grid == (1, 1):
            return self._layout(1, (self.features,), size, (self.side, self.side))
        cells = [(row, column) for row in range(1, grid[0] + 1) for column in range(1, grid[1] + 1)]
        pieces: list[list[str | int]] = [[*self._before(config, index, cell), self.features] for cell in cells]
        if config.overview != "none":
            overview = [*self._before(config, index, (0, 0)), self.features]
            pieces.insert(len(pieces) if config.overview == "last" else 0, overview)
        height, width = tiles.fitted_size(size[::-1], grid, self.side, config.max_upscale)
        pattern = tuple(part for piece in pieces for part in piece)
        return self._layout(len(pieces), pattern, size, (width, height))

    def write(
        self,
        image: Image.Image,
        config: TiledImageConfig,
        out: UInt8[np.ndarray, "n c"],
        *,
        index: int = 0,
        count: int = 1,
    ) -> None:
        """Write the patches of `image`."""
        self._write(self._tiles(image, config, count), out)

    def _tiles(self, image: Image.Image, config: TiledImageConfig, count: int) -> list[Image.Image]:
        grid = config.grid_of((image.height, image.width), self.side, count)
        if grid == (1, 1):
            return [self._whole(image, config)]
        options = {"max_upscale": config.max_upscale, "placement": config.placement, "colour": config.colour}
        images = tiles.split(image, grid, self.side, **options)
        if config.overview != "none":
            images.insert(len(images) if config.overview == "last" else 0, self._whole(image, config))
        return images

    def video(
        self, frames: Sequence[Image.Image], config: TiledImageConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Return frames spread evenly over the video, each as one tile, without an index."""
        chosen = np.linspace(0, len(frames) - 1, min(config.num_frames, len(frames))).round().astype(int)
        images = [self._whole(frames[i], config) for i in chosen]
        media = self._layout(len(images), (self.features * len(images),), frames[0].size, (self.side, self.side))
        return self._written(media, images)

    def reductions(self, config: TiledImageConfig) -> list[list[dict[str, Any]]]:
        """Fewer tiles of an image, then whole images only and fewer frames of a video."""
        fewer = range(config.max_tiles - 1, 0, -1) if config.splitting == "dynamic" else ()
        tiled = [{"max_tiles": most, "min_tiles": min(config.min_tiles, most)} for most in fewer]
        counts = range(config.num_frames, 0, -1)
        return [tiled, [{"splitting": "none", "num_frames": count} for count in counts]]

    def _before(self, config: TiledImageConfig, image: int, cell: tuple[int, int]) -> list[str]:
        """Return the text before the tile in a cell of the grid; (0, 0) is the overview."""
        row, column = cell
        if config.indicator == "index":
            return [config.index.format(image=image, row=row, column=column)]
        if config.indicator == "none" or cell == (1, 1):
            return []
        overview, between_columns, between_rows = config.separators
        return [overview if cell == (0, 0) else between_rows if column == 1 else between_columns]

    def _whole(self, image: Image.Image, config: TiledImageConfig) -> Image.Image:
        if config.whole_fit == "squash":
            return image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        (tile,) = tiles.split(image, (1, 1), self.side, placement=config.placement, colour=config.colour)
        return tile

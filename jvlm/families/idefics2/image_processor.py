"""Images of Idefics2: aspect kept between two edge lengths, or four crops and the whole; positions in a table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from PIL import Image

from jvlm.data.image_processor import ImageProcessorConfig, Limit, MediaPatches
from jvlm.data.video.sampling import SizeRule
from jvlm.errors import UserError
from jvlm.validation import check_fields

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig

# Steps k of nb patches that float32 puts one lower than the exact floor(70 k / nb), as transformers 4.40 to 4.54
# computed them, which is the code that the released weights were trained with.
_RELEASED = {
    25: (5, 10, 15, 20),
    49: (7, 14, 35, 42),
    50: (5, 10, 15, 20, 30, 40),
    55: (11, 22, 33, 44),
    58: (29,),
}
_RELEASED_GRID = 70

PositionRule = Literal["floor", "released"]


@dataclasses.dataclass(frozen=True)
class Idefics2ImageConfig(ImageProcessorConfig, tag="idefics2"):
    """The defaults are Idefics2-8B's; a split image costs 326 tokens, any other 66.

    Attributes:
      longest_edge: in pixels; the longer side is brought down to it with the aspect kept.
      shortest_edge: in pixels; each side is then brought up to it on its own.
      split: an image becomes its four quarters and itself, in this order; frames of videos never do.
      positions: how a patch finds its entry in the position table; "floor" is exact, "released" as in training, where
        rounding put some patches one entry lower (images of 25, 49, 50, 55 or 58 patches along a side).
      delimiter: token around the vision tokens of each image or crop; between two it stands once. Empty for none.
      resample: Pillow's number of the filter; 2 is bilinear.
      resize: False takes images, and the quarters of split ones, as they are.
    """

    limits: ClassVar[dict[str, Limit]] = {
        "longest_edge": Limit(help="longer side of an image after resizing, at most"),
        "shortest_edge": Limit(
            most=2**13, at_most="longest_edge", help="shorter side of an image after resizing, at least"
        ),
    }

    longest_edge: int = 980
    shortest_edge: int = 378
    split: bool = True
    positions: PositionRule = "floor"
    delimiter: str = "<fake_token_around_image>"
    resample: int = Image.Resampling.BILINEAR.value
    resize: bool = True

    def __post_init__(self):
        edges = dict.fromkeys(("longest_edge", "shortest_edge"), "[1, inf)")
        check_fields(self, "processor.image.", {**edges, "resample": "[0, 5]"})
        if not 0 < self.shortest_edge <= self.longest_edge:
            raise UserError(
                f"shortest_edge {self.shortest_edge} must be between 1 and longest_edge {self.longest_edge}"
            )

    def build(self, model: VLMConfig) -> Idefics2ImageProcessor:
        """Return the image processor of a model."""
        return Idefics2ImageProcessor(model, self)


def edge_resize(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) after the resize; the aspect is lost where a side is raised to ``shortest``."""
    aspect = width / height
    if width >= height and width > longest:
        height, width = int(longest / aspect), longest
    elif height > width and height > longest:
        height, width = longest, int(longest * aspect)
    return max(height, shortest), max(width, shortest)


def _frame_size(shortest: int, longest: int, frames: int, width: int, height: int) -> tuple[int, int]:
    height, width = edge_resize(height, width, shortest, longest)
    return width, height


def quarters(image: Image.Image) -> list[Image.Image]:
    """Top left, top right, bottom left, bottom right. Raises UserError for a side of one pixel, which has no half."""
    width, height = image.size
    if min(width, height) < 2:
        raise UserError(f"{width} x {height} pixels cannot be split into quarters")
    x, y = width // 2, height // 2
    boxes = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    return [image.crop(box) for box in boxes]


def table_positions(patches: int, grid: int, rule: PositionRule = "floor") -> np.ndarray:
    """Return the position, 0 to grid - 1, of each patch along a side: its share of the side, in steps of the table.

    Raises:
      UserError: the rule "released" for a table of another size than the released one's.
    """
    steps = np.arange(patches, dtype=np.int64)
    positions = (steps * grid // patches).astype(np.int32)
    if rule == "released":
        if grid != _RELEASED_GRID:
            raise UserError(f'positions="released" is known for tables of {_RELEASED_GRID}, not {grid}; use "floor"')
        positions[list(_RELEASED.get(patches, ()))] -= 1
    return positions


class Idefics2ImageProcessor:
    """Images and crops of any size; the connector says how many vision tokens each gives."""

    def __init__(self, model: VLMConfig, config: Idefics2ImageConfig):
        encoder = model.encoder
        if encoder.class_token:
            raise UserError("Idefics2ImageConfig is for encoders without a class token")
        self.patch_size, self.grid, self.patch_values = encoder.patch_size, encoder.grid, encoder.patch_values
        self.patch_group = 1
        self.tokens_per_image, self.placeholders = model.connector.tokens_per_image, model.decoder.placeholders
        self.min_image_patches = model.connector.min_image_patches
        self.delimiter_tokens = (config.delimiter,) if config.delimiter else ()
        self.merged_delimiter = config.delimiter or None

    def image(self, image: Image.Image, config: Idefics2ImageConfig, *, index: int = 0, count: int = 1) -> MediaPatches:
        """Return one image, or four crops and the image."""
        return self._media([*quarters(image), image] if config.split else [image], config)

    def video(
        self, frames: Sequence[Image.Image], config: Idefics2ImageConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Return each frame as an image of its own, never split."""
        return self._media(frames, config)

    def frame_size(self, config: Idefics2ImageConfig) -> SizeRule | None:
        """Return the resize of images, which leaves what it gave as it is."""
        return functools.partial(_frame_size, config.shortest_edge, config.longest_edge) if config.resize else None

    def max_image_patches(self, config: Idefics2ImageConfig) -> int | None:
        """Return a square of the longest edge has the most."""
        if not config.resize:
            return None
        return (config.longest_edge // self.patch_size) ** 2

    def reductions(self, config: Idefics2ImageConfig) -> list[list[dict[str, Any]]]:
        """Shorter edges, a patch at a time, which cost fewer patches; the same unsplit, which cost fewer tokens too."""
        if not config.resize:
            return [[{"split": False}] if config.split else []]
        edges = range(config.longest_edge, config.shortest_edge - 1, -self.patch_size)
        whole = [{"split": False, "longest_edge": edge} for edge in edges]
        return [[{"longest_edge": edge} for edge in edges[1:]], whole if config.split else []]

    def _media(self, images: Sequence[Image.Image], config: Idefics2ImageConfig) -> MediaPatches:
        sizes = [self._size(image, config) for image in images]
        arrays = [self._patches(image, size, config) for image, size in zip(images, sizes, strict=True)]
        counts = [len(patches) for patches, _ in arrays]
        features = [self.tokens_per_image or count for count in counts]
        numbers = np.arange(1, len(arrays) + 1, dtype=np.int32)
        segment_ids = np.repeat(numbers, counts)
        if min(counts) < self.min_image_patches:
            raise UserError(f"an image of {min(counts)} patches, less than min_image_patches {self.min_image_patches}")
        fed = [self.placeholders(count) for count in features]
        begins = np.cumsum([0, *features[:-1]])
        of_token = np.concatenate([begin + np.arange(n) for begin, n in zip(begins, fed, strict=True)])
        pattern = [part for n in fed for part in (config.delimiter, n, config.delimiter) if part != ""]
        height, width = sizes[-1]
        return MediaPatches(
            patches=np.concatenate([patches for patches, _ in arrays]),
            segment_ids=segment_ids,
            window_ids=segment_ids,
            positions=np.concatenate([positions for _, positions in arrays]),
            token_segment_ids=np.repeat(numbers, features),
            vision_index=of_token.astype(np.int32),
            token_pattern=tuple(pattern),
            original=images[-1].size,
            resized=(width, height),
        )

    def _size(self, image: Image.Image, config: Idefics2ImageConfig) -> tuple[int, int]:
        """Return (height, width) after the resize."""
        if config.resize:
            return edge_resize(image.height, image.width, config.shortest_edge, config.longest_edge)
        return image.height, image.width

    def _patches(
        self, image: Image.Image, size: tuple[int, int], config: Idefics2ImageConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (patches [n, c], positions [n, 2]); pixels that fill no patch at the right and bottom are lost."""
        p = self.patch_size
        rows, columns = size[0] // p, size[1] // p
        if not rows or not columns:
            raise UserError(f"{size[1]} x {size[0]} pixels hold no patch of {p} x {p}")
        if config.resize:
            image = image.resize((size[1], size[0]), Image.Resampling(config.resample))
        pixels = np.asarray(image, np.uint8)
        pixels = pixels[: rows * p, : columns * p]
        # (row, y, column, x, c) -> (row, column, c, y, x)
        patches = pixels.reshape(rows, p, columns, p, -1).transpose(0, 2, 4, 1, 3)
        at = np.meshgrid(
            table_positions(rows, self.grid, config.positions),
            table_positions(columns, self.grid, config.positions),
            indexing="ij",
        )
        return patches.reshape(rows * columns, -1), np.stack(at, -1).reshape(-1, 2)

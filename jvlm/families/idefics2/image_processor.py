"""Images of Idefics2: aspect kept between two edge lengths, or four crops and the whole; positions in a table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Int, UInt8
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


def quarters(size: tuple[int, int]) -> tuple[tuple[int, int, int, int], ...]:
    """Return the boxes of the quarters of an image of (width, height): top left, top right, bottom left, bottom right.

    Raises:
      UserError: a side of one pixel, which has no half.
    """
    width, height = size
    if min(width, height) < 2:
        raise UserError(f"{width} x {height} pixels cannot be split into quarters")
    x, y = width // 2, height // 2
    return (0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)


def table_positions(patches: int, grid: int, rule: PositionRule = "floor") -> Int[np.ndarray, " n"]:
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
        media = self.layout(image.size, config, index=index, count=count)
        return self._written(media, self._crops(image, config), config)

    def layout(
        self, size: tuple[int, int], config: Idefics2ImageConfig, *, index: int = 0, count: int = 1
    ) -> MediaPatches:
        """Return `image` of an image of (width, height), with patches whose values mean nothing."""
        boxes = quarters(size) if config.split else ()
        return self._layout([*((right - left, low - top) for left, top, right, low in boxes), size], config)

    def write(
        self,
        image: Image.Image,
        config: Idefics2ImageConfig,
        out: UInt8[np.ndarray, "n c"],
        *,
        index: int = 0,
        count: int = 1,
    ) -> None:
        """Write the patches of `image`."""
        self._write(self._crops(image, config), config, out)

    def video(
        self, frames: Sequence[Image.Image], config: Idefics2ImageConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Return each frame as an image of its own, never split."""
        return self._written(self._layout([frame.size for frame in frames], config), frames, config)

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

    @staticmethod
    def _crops(image: Image.Image, config: Idefics2ImageConfig) -> list[Image.Image]:
        return [*(image.crop(box) for box in quarters(image.size)), image] if config.split else [image]

    def _written(self, media: MediaPatches, images: Sequence[Image.Image], config: Idefics2ImageConfig) -> MediaPatches:
        """Return the layout with its patches."""
        patches = np.empty(media.patches.shape, np.uint8)
        self._write(images, config, patches)
        return dataclasses.replace(media, patches=patches)

    def _layout(self, originals: Sequence[tuple[int, int]], config: Idefics2ImageConfig) -> MediaPatches:
        """Everything about images of (width, height), but for their pixels."""
        sizes = [self._size(size, config) for size in originals]
        positions = [self._positions(size, config) for size in sizes]
        counts = [len(one) for one in positions]
        features = [self.tokens_per_image or count for count in counts]
        numbers = np.arange(1, len(counts) + 1, dtype=np.int32)
        segment_ids = np.repeat(numbers, counts)
        if min(counts) < self.min_image_patches:
            raise UserError(f"an image of {min(counts)} patches, less than min_image_patches {self.min_image_patches}")
        fed = [self.placeholders(count) for count in features]
        begins = np.cumsum([0, *features[:-1]])
        of_token = np.concatenate([begin + np.arange(n) for begin, n in zip(begins, fed, strict=True)])
        pattern = [part for n in fed for part in (config.delimiter, n, config.delimiter) if part != ""]
        height, width = sizes[-1]
        return MediaPatches(
            patches=np.broadcast_to(np.uint8(0), (sum(counts), self.patch_values)),
            segment_ids=segment_ids,
            window_ids=segment_ids,
            positions=np.concatenate(positions),
            token_segment_ids=np.repeat(numbers, features),
            vision_index=of_token.astype(np.int32),
            token_pattern=tuple(pattern),
            original=originals[-1],
            resized=(width, height),
        )

    def _size(self, size: tuple[int, int], config: Idefics2ImageConfig) -> tuple[int, int]:
        """Return (height, width) of an image of (width, height) after the resize."""
        width, height = size
        if config.resize:
            return edge_resize(height, width, config.shortest_edge, config.longest_edge)
        return height, width

    def _positions(self, size: tuple[int, int], config: Idefics2ImageConfig) -> np.ndarray:
        """Return the positions [n, 2] of the patches of an image of (height, width)."""
        p = self.patch_size
        rows, columns = size[0] // p, size[1] // p
        if not rows or not columns:
            raise UserError(f"{size[1]} x {size[0]} pixels hold no patch of {p} x {p}")
        at = np.meshgrid(
            table_positions(rows, self.grid, config.positions),
            table_positions(columns, self.grid, config.positions),
            indexing="ij",
        )
        return np.stack(at, -1).reshape(-1, 2)

    def _write(self, images: Sequence[Image.Image], config: Idefics2ImageConfig, out: UInt8[np.ndarray, "n c"]) -> None:
        """Write the patches of images; pixels that fill no patch at the right and bottom are lost."""
        p, begin = self.patch_size, 0
        for image in images:
            height, width = self._size(image.size, config)
            if config.resize:
                image = image.resize((width, height), Image.Resampling(config.resample))
            rows, columns = height // p, width // p
            pixels = np.asarray(image, np.uint8)[: rows * p, : columns * p]
            # (row, y, column, x, c) -> (row, column, c, y, x)
            patches = pixels.reshape(rows, p, columns, p, -1).transpose(0, 2, 4, 1, 3)
            out[begin : begin + rows * columns].reshape(patches.shape)[:] = patches
            begin += rows * columns

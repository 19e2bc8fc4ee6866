"""Idefics2's pictures: aspect kept between two edge lengths, or four crops and the whole; places in a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from jvlm.data.vision import MediaConfig, MediaPatches, register
from jvlm.errors import UserError
from jvlm.models.vlm import VLMConfig
from jvlm.validation import check_fields

# Steps k of nb patches that float32 puts one place lower than the exact floor(70 k / nb), as transformers 4.40 to 4.54
# computed them, which is the code that the released weights were trained with.
_RELEASED = {
    25: (5, 10, 15, 20),
    49: (7, 14, 35, 42),
    50: (5, 10, 15, 20, 30, 40),
    55: (11, 22, 33, 44),
    58: (29,),
}
_RELEASED_GRID = 70

PlaceRule = Literal["floor", "released"]


@dataclasses.dataclass(frozen=True)
class EdgeLimits(MediaConfig):
    """The defaults are Idefics2-8B's; a split image costs 326 tokens, any other 66.

    Attributes:
      longest_edge, shortest_edge: in pixels. The longer side is brought down to the first with the aspect kept, then
        each side up to the second on its own.
      split: an image becomes its four quarters and itself, in this order; frames of videos never do.
      places: how a patch finds its place in the position table; "floor" is exact, "released" as in training, where
        rounding put some patches one place lower (images of 25, 49, 50, 55 or 58 patches along a side).
      mark: token around the features of each frame; between two frames it stands once. Empty for none.
      resample: Pillow's number of the filter; 2 is bilinear.
      resize: False takes pictures, and the quarters of split ones, as they are.
    """

    longest_edge: int = 980
    shortest_edge: int = 378
    split: bool = True
    places: PlaceRule = "floor"
    mark: str = "<fake_token_around_image>"
    resample: int = Image.Resampling.BILINEAR.value
    resize: bool = True

    def __post_init__(self):
        edges = dict.fromkeys(("longest_edge", "shortest_edge"), "[1, inf)")
        check_fields(self, "processor.media.", {**edges, "resample": "[0, 5]"})
        if not 0 < self.shortest_edge <= self.longest_edge:
            raise UserError(
                f"shortest_edge {self.shortest_edge} must be between 1 and longest_edge {self.longest_edge}"
            )


def edge_resize(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) after the resize; the aspect is lost where a side is raised to ``shortest``."""
    aspect = width / height
    if width >= height and width > longest:
        height, width = int(longest / aspect), longest
    elif height > width and height > longest:
        height, width = longest, int(longest * aspect)
    return max(height, shortest), max(width, shortest)


def quarters(image: Image.Image) -> list[Image.Image]:
    """Top left, top right, bottom left, bottom right. Raises ValueError for a side of one pixel, which has no half."""
    width, height = image.size
    if min(width, height) < 2:
        raise ValueError(f"{width} x {height} pixels cannot be split into quarters")
    x, y = width // 2, height // 2
    boxes = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    return [image.crop(box) for box in boxes]


def table_places(patches: int, grid: int, rule: PlaceRule = "floor") -> np.ndarray:
    """Place, 0 to grid - 1, of each patch along a side of ``patches``: its share of the side, in steps of the table.

    Raises:
      UserError: the rule "released" for a table of another size than the released one's.
    """
    steps = np.arange(patches, dtype=np.int64)
    places = (steps * grid // patches).astype(np.int32)
    if rule == "released":
        if grid != _RELEASED_GRID:
            raise UserError(f'places="released" is known for tables of {_RELEASED_GRID}, not {grid}; use "floor"')
        places[list(_RELEASED.get(patches, ()))] -= 1
    return places


@register(EdgeLimits, "idefics2")
class EdgeVision:
    """Pictures and crops of any size; the connector says how many features each frame gives."""

    def __init__(self, model: VLMConfig, config: EdgeLimits):
        encoder = model.encoder
        if encoder.class_token:
            raise UserError("EdgeLimits is for encoders without a class token")
        self.patch_size, self.grid, self.patch_values = encoder.patch_size, encoder.grid, encoder.patch_values
        self.patch_group = 1
        self.tokens_per_image, self.placeholders = model.connector.tokens_per_image, model.decoder.placeholders
        self.min_image_patches = model.connector.min_image_patches
        self.marks = (config.mark,) if config.mark else ()
        self.merged_mark = config.mark or None

    def image(self, image: Image.Image, config: EdgeLimits, *, index: int = 0, count: int = 1) -> MediaPatches:
        """One frame, or five."""
        return self._media([*quarters(image), image] if config.split else [image], config)

    def video(self, frames: Sequence[Image.Image], config: EdgeLimits) -> MediaPatches:
        """Each frame as an image of its own, never split."""
        return self._media(frames, config)

    def max_image_patches(self, config: EdgeLimits) -> int | None:
        """A square of the longest edge has the most."""
        if not config.resize:
            return None
        return (config.longest_edge // self.patch_size) ** 2

    def smaller(self, config: EdgeLimits) -> list[list[dict[str, Any]]]:
        """Shorter edges, a patch at a time, which cost fewer patches; the same unsplit, which cost fewer tokens too."""
        if not config.resize:
            return [[{"split": False}] if config.split else []]
        edges = range(config.longest_edge, config.shortest_edge - 1, -self.patch_size)
        whole = [{"split": False, "longest_edge": edge} for edge in edges]
        return [[{"longest_edge": edge} for edge in edges[1:]], whole if config.split else []]

    def _media(self, pictures: Sequence[Image.Image], config: EdgeLimits) -> MediaPatches:
        sizes = [self._size(p, config) for p in pictures]
        frames = [self._frame(p, size, config) for p, size in zip(pictures, sizes, strict=True)]
        counts = [len(patches) for patches, _ in frames]
        features = [self.tokens_per_image or count for count in counts]
        numbers = np.arange(1, len(frames) + 1, dtype=np.int32)
        frame_ids = np.repeat(numbers, counts)
        if min(counts) < self.min_image_patches:
            raise ValueError(f"an image of {min(counts)} patches, less than min_image_patches {self.min_image_patches}")
        fed = [self.placeholders(count) for count in features]
        begins = np.cumsum([0, *features[:-1]])
        of_token = np.concatenate([begin + np.arange(n) for begin, n in zip(begins, fed, strict=True)])
        layout = [part for n in fed for part in (config.mark, n, config.mark) if part != ""]
        height, width = sizes[-1]
        return MediaPatches(
            patches=np.concatenate([patches for patches, _ in frames]),
            frame_ids=frame_ids,
            window_ids=frame_ids,
            positions=np.concatenate([places for _, places in frames]),
            feature_frames=np.repeat(numbers, features),
            feature_of_token=of_token.astype(np.int32),
            layout=tuple(layout),
            original=pictures[-1].size,
            resized=(width, height),
        )

    def _size(self, picture: Image.Image, config: EdgeLimits) -> tuple[int, int]:
        """(height, width) of a frame."""
        if config.resize:
            return edge_resize(picture.height, picture.width, config.shortest_edge, config.longest_edge)
        return picture.height, picture.width

    def _frame(self, picture: Image.Image, size: tuple[int, int], config: EdgeLimits):
        """(patches [n, c], places [n, 2]) of one frame; pixels that fill no patch at the right and bottom are lost."""
        p = self.patch_size
        rows, columns = size[0] // p, size[1] // p
        if not rows or not columns:
            raise ValueError(f"{size[1]} x {size[0]} pixels hold no patch of {p} x {p}")
        if config.resize:
            picture = picture.resize((size[1], size[0]), Image.Resampling(config.resample))
        pixels = np.asarray(picture, np.uint8)
        pixels = pixels[: rows * p, : columns * p]
        # (row, y, column, x, c) -> (row, column, c, y, x)
        patches = pixels.reshape(rows, p, columns, p, -1).transpose(0, 2, 4, 1, 3)
        at = np.meshgrid(
            table_places(rows, self.grid, config.places), table_places(columns, self.grid, config.places), indexing="ij"
        )
        return patches.reshape(rows * columns, -1), np.stack(at, -1).reshape(-1, 2)

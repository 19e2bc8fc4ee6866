"""Patches of images that are not decoded yet: which examples share a sequence depends on their number alone.

So a window of examples can be planned in little memory, from the headers of their images, and each image is decoded
when its sequence is given out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from jvlm.data.content import Image
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.image_processor import ImageProcessorConfig, MediaPatches
from jvlm.data.images import open_image


@runtime_checkable
class PlansImages(Protocol):
    """An image processor that knows the patches of an image, but for their pixels, from its size."""

    patch_values: int

    def layout(self, size: tuple[int, int], config: ImageProcessorConfig, *, index: int, count: int) -> MediaPatches:
        """Return what `image` returns for an image of (width, height), with patches whose values mean nothing."""
        ...

    def write(
        self,
        image: PIL.Image.Image,
        config: ImageProcessorConfig,
        out: UInt8[np.ndarray, "n c"],
        *,
        index: int,
        count: int,
    ) -> None:
        """Write the patches that `image` returns."""
        ...


@dataclasses.dataclass(frozen=True)
class UnreadImage:
    """Some of the patches of an image that is not decoded yet.

    Attributes:
      part: the image.
      size: (width, height), as its header says.
      config: settings that it is processed with.
      index, count: which it is of how many images of its example.
      origin, field, roots, still: as of `jvlm.data.images.open_image`.
      patches: of the whole image.
      start, stop: of them, those that are meant.
    """

    part: Image
    size: tuple[int, int]
    config: ImageProcessorConfig
    index: int
    count: int
    origin: Origin
    field: str
    roots: tuple[str, ...]
    still: bool
    patches: int
    start: int
    stop: int

    def open(self) -> PIL.Image.Image:
        """Return the whole image, decoded.

        Raises:
          ExampleError: it cannot be decoded, or has another size than its header said.
        """
        image = open_image(self.part.source, origin=self.origin, field=self.field, roots=self.roots, still=self.still)
        if image.size != self.size:
            problem = f"{image.width} x {image.height} pixels, where its header said {self.size[0]} x {self.size[1]}"
            raise ExampleError(self.origin, self.field, problem, "Replace or remove the image")
        return image


@dataclasses.dataclass(frozen=True)
class UnreadPatches:
    """Patches of images in order, some of which are not decoded yet. It has the length, shape and slices of an array.

    Attributes:
      pieces: images that are not decoded, and arrays of patches.
      values: of a patch.
    """

    pieces: tuple[UnreadImage | UInt8[np.ndarray, "n c"], ...]
    values: int

    def __len__(self) -> int:
        return sum(map(_count, self.pieces))

    @property
    def shape(self) -> tuple[int, int]:
        """(patches, values), as of an array."""
        return len(self), self.values

    def __getitem__(self, part: slice) -> UnreadPatches:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"patches in steps of {step}")
        kept: list[Any] = []
        for piece, begin in self.pieces_from():
            a, b = max(start - begin, 0), min(stop - begin, _count(piece))
            if a < b:
                kept.append(
                    piece[a:b]
                    if isinstance(piece, np.ndarray)
                    else dataclasses.replace(piece, start=piece.start + a, stop=piece.start + b)
                )
        return UnreadPatches(tuple(kept), self.values)

    def pieces_from(self) -> Iterator[tuple[UnreadImage | np.ndarray, int]]:
        """Yield (piece, number of its first patch) in order."""
        begin = 0
        for piece in self.pieces:
            yield piece, begin
            begin += _count(piece)


def _count(piece: UnreadImage | np.ndarray) -> int:
    return len(piece) if isinstance(piece, np.ndarray) else piece.stop - piece.start


def joined_patches(
    parts: Sequence[UInt8[np.ndarray, "_ v"] | UnreadPatches], values: int
) -> UInt8[np.ndarray, "_ v"] | UnreadPatches:
    """Return patches one after the other; a single array as it is."""
    if any(isinstance(part, UnreadPatches) for part in parts):
        pieces: list[Any] = []
        for part in parts:
            pieces += part.pieces if isinstance(part, UnreadPatches) else [part]
        return UnreadPatches(tuple(piece for piece in pieces if _count(piece)), values)
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.zeros((0, values), np.uint8), *parts])

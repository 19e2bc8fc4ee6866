"""Images that occur in several examples: files with the same bytes, whatever their names."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

_FIRST = 3  # examples remembered of an image


@dataclasses.dataclass(frozen=True)
class ImageLocation:
    """Where an image is: its source, the index of the example in it, and its number among the example's images."""

    source: str
    index: int
    number: int


@dataclasses.dataclass
class EqualImage:
    """An image of several examples.

    Attributes:
      examples: that it is in, by source.
      first: in the first of them.
    """

    examples: Counter[str]
    first: list[ImageLocation]

    def add(self, location: ImageLocation) -> None:
        """Count an example."""
        self.examples[location.source] += 1
        self.first += [location] if len(self.first) < _FIRST else []


class EqualImages:
    """Finds the images of several examples by their digests; an image that an example holds twice counts once."""

    def __init__(self):
        self._once: dict[bytes, ImageLocation] = {}
        self._several: dict[bytes, EqualImage] = {}

    def add(self, source: str, index: int, digests: Iterable[bytes]) -> None:
        """Take the digests of an example's images."""
        seen = set()
        for number, digest in enumerate(digests):
            if digest in seen:
                continue
            seen.add(digest)
            location = ImageLocation(source, index, number)
            if digest in self._several:
                self._several[digest].add(location)
            elif digest in self._once:
                first = self._once.pop(digest)
                equal = self._several[digest] = EqualImage(Counter({first.source: 1}), [first])
                equal.add(location)
            else:
                self._once[digest] = location

    def images(self) -> list[EqualImage]:
        """Return the images, those of several sources first, then those of most examples."""
        return sorted(self._several.values(), key=lambda one: (-len(one.examples), -one.examples.total()))

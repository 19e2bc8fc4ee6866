"""Images that look alike, in different examples: candidates by perceptual hash, then a second look at both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image

from jvlm.data.prepare.hamming import near
from jvlm.data.prepare.image_hash import MAX_DISTANCE, ImageHash, Thumbnail, same_shape, second_look
from jvlm.data.view.equal_images import ImageLocation

BITS = 256
_LOOKED_AT = 60  # pairs that get a second look
_THUMBNAILS = 32  # in memory: an image can be in many pairs


@dataclasses.dataclass(frozen=True)
class NearPair:
    """Two images that look alike, and in how many bits their hashes differ."""

    first: ImageLocation
    second: ImageLocation
    bits: int


class NearImages:
    """Finds images that look alike by their hashes; files with the same bytes are `EqualImages`."""

    def __init__(self):
        self._locations: list[ImageLocation] = []
        self._hashes: list[ImageHash] = []
        self._digests: list[bytes] = []

    def __len__(self) -> int:
        return len(self._locations)

    def add(self, source: str, index: int, hashes: Sequence[ImageHash], digests: Sequence[bytes]) -> None:
        """Take the hashes of an example's images, and the digests of their files."""
        for number, (found, digest) in enumerate(zip(hashes, digests, strict=False)):
            self._locations.append(ImageLocation(source, index, number))
            self._hashes.append(found)
            self._digests.append(digest)

    def candidates(self) -> list[NearPair]:
        """Return pairs of images of one shape and different examples whose hashes are near, the nearest first."""
        if not self._hashes:
            return []
        hashes, pairs = np.stack([one.words for one in self._hashes]), []
        for first, second, bits in near(hashes, hashes, MAX_DISTANCE[BITS]):
            for a, b, different in zip(first.tolist(), second.tolist(), bits.tolist(), strict=True):
                one, other = self._locations[a], self._locations[b]
                is_same = (one.source, one.index) == (other.source, other.index)
                if a >= b or is_same or self._digests[a] == self._digests[b]:
                    continue
                if same_shape(self._hashes[a].size, self._hashes[b].size):
                    pairs.append((different, a, b))
        return [NearPair(self._locations[a], self._locations[b], bits) for bits, a, b in sorted(pairs)]

    def pairs(self, open_image: Callable[[ImageLocation], PIL.Image.Image], most: int) -> list[NearPair]:
        """Return up to ``most`` pairs that show the same in a second look, the nearest first."""

        @functools.lru_cache(maxsize=_THUMBNAILS)
        def look(location: ImageLocation) -> Thumbnail:
            return Thumbnail.of(open_image(location))

        found = []
        for pair in self.candidates()[:_LOOKED_AT]:
            if second_look(look(pair.first), look(pair.second)).same:
                found.append(pair)
            if len(found) == most:
                break
        return found

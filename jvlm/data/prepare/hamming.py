"""All pairs of hashes that differ in few bits, without comparing all with all.

Hashes are cut into bands. Two that differ in d bits have, in one of m bands, at most d // m different bits: so it is
enough to look up each band with every change of so many bits (multi-index hashing; Norouzi, Punjani and Fleet, CVPR
2012). Nothing is missed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

_WORD = 64
_MOST_KEY_BITS = 22  # of the table that finds a key's hashes
_CHUNK = 1 << 21  # pairs compared at a time


class Band(NamedTuple):
    """Bits of a hash: ``bits`` of its word ``word``, from bit ``shift`` on."""

    word: int
    shift: int
    bits: int

    def keys(self, hashes: UInt64[np.ndarray, "n w"]) -> Int[np.ndarray, " n"]:
        """Return these bits of each hash as a number."""
        mask = np.uint64((1 << self.bits) - 1)
        return ((hashes[:, self.word] >> np.uint64(self.shift)) & mask).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Bands:
    """How hashes are cut.

    Attributes:
      bands: that together are all bits.
      distance: most bits in which a pair differs.
    """

    bands: tuple[Band, ...]
    distance: int

    @property
    def radius(self) -> int:
        """Bits that differ, at most, in one band of each pair."""
        return self.distance // len(self.bands)

    def masks(self, band: Band) -> list[int]:
        """Return every change of a band's key that has to be looked up."""
        return [
            sum(1 << bit for bit in bits)
            for count in range(self.radius + 1)
            for bits in itertools.combinations(range(band.bits), count)
        ]

    def is_first(self, band: int, different: UInt64[np.ndarray, "n w"]) -> np.ndarray:
        """Return whether no band before this one finds a pair, whose bits differ as given: each pair counts once."""
        first = np.ones(len(different), bool)
        for earlier in self.bands[:band]:
            first &= np.bitwise_count(earlier.keys(different).astype(np.uint64)) > self.radius
        return first


def bands_for(count: int, words: int, distance: int) -> Bands:
    """Return the bands with which the search among ``count`` hashes takes the fewest steps.

    Args:
      words: of a hash, 64 bits each.
    """

    def steps(parts: int) -> float:
        bits, number = _WORD // parts, parts * words
        masks = sum(math.comb(bits, k) for k in range(distance // number + 1))
        return number * masks * (1 + count / 2**bits)

    parts = min((p for p in range(1, 17) if math.ceil(_WORD / p) <= _MOST_KEY_BITS), key=steps)
    edges = [round(_WORD * k / parts) for k in range(parts + 1)]
    bands = [Band(w, a, b - a) for w in range(words) for a, b in itertools.pairwise(edges)]
    return Bands(tuple(bands), distance)


def near(
    queries: UInt64[np.ndarray, "q w"], stored: UInt64[np.ndarray, "s w"], distance: int
) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """Yield every pair of a query and a stored hash that differ in at most ``distance`` bits, once.

    Yields:
      Arrays (index of the query, index of the stored hash, bits that differ), in no order.
    """
    if not len(queries) or not len(stored):
        return
    plan = bands_for(len(stored), stored.shape[1], distance)
    for number, band in enumerate(plan.bands):
        keys = band.keys(stored)
        order = np.argsort(keys, kind="stable")
        starts = np.searchsorted(keys[order], np.arange((1 << band.bits) + 1))
        asked = band.keys(queries)
        for mask in plan.masks(band):
            first, last = starts[asked ^ mask], starts[(asked ^ mask) + 1]
            for some in _chunks(last - first):
                counts = (last - first)[some]
                q = np.repeat(some, counts)
                within = np.arange(len(q)) - np.repeat(np.cumsum(counts) - counts, counts)
                s = order[np.repeat(first[some], counts) + within]
                different = queries[q] ^ stored[s]
                bits = np.bitwise_count(different).sum(axis=1, dtype=np.int64)
                close = np.flatnonzero(bits <= distance)
                close = close[plan.is_first(number, different[close])]
                if len(close):
                    yield q[close], s[close], bits[close]


def _chunks(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Yield queries with candidates, as many at a time as have no more pairs than a chunk (or one query)."""
    asked = np.flatnonzero(counts)
    ends = np.cumsum(counts[asked])
    start = 0
    while start < len(asked):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + _CHUNK, "right")), start + 1)
        yield asked[start:stop]
        start = stop

"""Pairs of examples that may be duplicates, from hashes and keys alone; at most so many of each, earliest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int, UInt64

from jvlm.data.prepare import hamming

_BUFFER = 1 << 22


class Pairs:
    """Pairs (later, earlier) of examples, each once, with the ``most`` earliest of each later one.

    Attributes:
      cut: pairs that were left out for that.
    """

    def __init__(self, most: int):
        self.most, self.cut = most, 0
        self._pairs = np.zeros((0, 2), np.int64)
        self._waiting: list[np.ndarray] = []
        self._size = 0

    def add(self, later: Int[np.ndarray, " n"], earlier: Int[np.ndarray, " n"]) -> None:
        """Take pairs; the same ones may come again."""
        self._waiting.append(np.stack([later, earlier], axis=1))
        self._size += len(later)
        if self._size > _BUFFER:
            self._prune()

    def _prune(self) -> None:
        pairs = np.unique(np.concatenate([self._pairs, *self._waiting]), axis=0)
        starts = np.searchsorted(pairs[:, 0], pairs[:, 0], "left")
        keep = np.arange(len(pairs)) - starts < self.most
        self.cut += int((~keep).sum())
        self._pairs, self._waiting, self._size = pairs[keep], [], 0

    def by_later(self) -> Iterator[tuple[int, list[int]]]:
        """Yield each later example with its earlier ones, in order."""
        self._prune()
        if not len(self._pairs):
            return
        later, starts = np.unique(self._pairs[:, 0], return_index=True)
        ends = [*starts[1:].tolist(), len(self._pairs)]
        for one, start, end in zip(later.tolist(), starts.tolist(), ends, strict=True):
            yield one, self._pairs[start:end, 1].tolist()


def near_hashes(
    examples: Int[np.ndarray, " n"], hashes: UInt64[np.ndarray, "n w"], distance: int, first: int, pairs: Pairs
) -> None:
    """Add the pairs of examples whose hashes differ in at most ``distance`` bits.

    Args:
      first: earliest example that can be the later one of a pair.
    """
    later = examples >= first
    asked = examples[later]
    for q, s, _ in hamming.near(hashes[later], hashes, distance):
        ordered = examples[s] < asked[q]
        pairs.add(asked[q][ordered], examples[s][ordered])


def shared_keys(examples: Int[np.ndarray, " n"], keys: UInt64[np.ndarray, "n bands"], first: int, pairs: Pairs) -> None:
    """Add the pairs of examples that have a key in common in the same place, as `ngrams.minhash_keys` gives them."""
    for column in keys.T:
        order = np.lexsort((examples, column))
        starts = np.searchsorted(column[order], column[order], "left")
        before = np.arange(len(order)) - starts
        counts = np.where(examples[order] >= first, np.minimum(before, pairs.most), 0)
        pairs.cut += int((np.where(examples[order] >= first, before, 0) - counts).sum())
        some = np.flatnonzero(counts)
        for part in _parts(some, counts[some]):
            number = counts[part]
            q = np.repeat(part, number)
            s = np.repeat(starts[part], number) + np.arange(len(q)) - np.repeat(np.cumsum(number) - number, number)
            pairs.add(examples[order][q], examples[order][s])


def _parts(some: np.ndarray, counts: np.ndarray) -> Iterable[np.ndarray]:
    return np.split(some, np.searchsorted(np.cumsum(counts), np.arange(_BUFFER, int(counts.sum()), _BUFFER)))

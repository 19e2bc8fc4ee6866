"""The search misses no pair and invents none: compared with comparing all."""

from __future__ import annotations

import numpy as np
import pytest

from jvlm.data.prepare.hamming import bands_for, near


def _hashes(seed: int, count: int, words: int) -> np.ndarray:
    """Random hashes, of which many are others with a few bits changed."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, (count, words), np.uint64)
    bits = np.unpackbits(hashes.view(np.uint8).reshape(count, -1), axis=1)
    for row in range(count // 2):
        changed = rng.permutation(64 * words)[: rng.integers(0, 14 * words)]
        bits[row + count // 2] = bits[row]
        bits[row + count // 2, changed] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64).reshape(count, words)


@pytest.mark.parametrize(("words", "distance"), [(1, 0), (1, 3), (1, 8), (4, 24), (4, 3)])
@pytest.mark.parametrize("count", [1, 40, 900])
def test_near_finds_what_comparing_all_finds(words, distance, count):
    stored, queries = _hashes(0, count, words), _hashes(0, count + 7, words)
    bits = np.bitwise_count(queries[:, None] ^ stored[None]).sum(-1)
    expected = {(q, s, int(bits[q, s])) for q, s in zip(*np.nonzero(bits <= distance), strict=True)}
    found = [tuple(map(int, pair)) for arrays in near(queries, stored, distance) for pair in zip(*arrays, strict=True)]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert count == 1 or expected


def test_equal_hashes_are_all_found_though_they_fill_more_than_one_chunk():
    stored = np.zeros((3000, 1), np.uint64)
    assert sum(len(q) for q, _, _ in near(stored[:800], stored, 8)) == 2_400_000


@pytest.mark.parametrize("count", [10, 10**4, 10**6, 10**9])
@pytest.mark.parametrize(("words", "distance"), [(1, 8), (4, 24)])
def test_bands_are_all_bits_once(count, words, distance):
    plan = bands_for(count, words, distance)
    covered = sorted((band.word, band.shift + bit) for band in plan.bands for bit in range(band.bits))
    assert covered == [(word, bit) for word in range(words) for bit in range(64)]
    assert (plan.radius + 1) * len(plan.bands) > distance

"""Texts as words and n-grams: exact search for what texts share, and the near duplicates among many.

`NgramIndex` finds n-grams of evaluation sets in training texts (of 13 words, as GPT-3's appendix C does, arXiv
2005.14165). `minhash_keys` and `jaccard` find texts that are nearly the same (Broder 1997).
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

NGRAM_WORDS = 13
SHINGLE_WORDS = 5
# scripts that are written without spaces: each character is a word
_WORD = re.compile(
    r"[\u2e80-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W_\u2e80-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SEED = 20
KEYS, _ROWS = 32, 4


def normalized(text: str) -> str:
    """Return a text in one form: Unicode NFKC, lower case, one space between words, no punctuation."""
    return " ".join(words(text))


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; a character of Chinese or Japanese is a word."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@functools.lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def ngram_hashes(of: Sequence[str], n: int) -> UInt64[np.ndarray, " n"]:
    """Return a 64-bit hash of each run of ``n`` words, in order; the same in every process."""
    count = len(of) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    hashes = np.fromiter(map(_word_hash, of), np.uint64, len(of))
    total = np.zeros(count, np.uint64)
    for k in range(n):
        total = total * _MULTIPLIER + hashes[k : k + count]
    return _mixed(total)


def _mixed(values: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """Splitmix64's last step: every bit depends on all bits of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Overlap(NamedTuple):
    """Words that a text shares with an item of an index.

    Attributes:
      item: as it was given to `NgramIndex.add`.
      text: the words shared.
      start: of the first of them among the words of the searched text.
    """

    item: int
    text: str
    start: int


class NgramIndex:
    """The n-grams of items of evaluation sets, searched for in other texts. Add all items, then search.

    An item with fewer words than ``n`` is found as a whole, if it has at least ``least_words``. Hashes find candidates,
    whose words are then compared: what is reported is shared.

    Args:
      n: words of an n-gram.
      least_words: of items that are looked for; shorter ones would be found everywhere.
      most_items: an n-gram of more items than this is a phrase of the evaluation, as "answer the question using a
        single word", and is not looked for.

    Attributes:
      too_short: items that are not looked for.
    """

    def __init__(self, n: int = NGRAM_WORDS, *, least_words: int = 8, most_items: int = 10):
        if not 1 <= least_words <= n:
            raise ValueError(f"least_words is {least_words}; it must be between 1 and n, which is {n}")
        self.n, self.least_words, self.most_items = n, least_words, most_items
        self.too_short = 0
        self._words: list[tuple[int, tuple[str, ...]]] = []
        # length of n-grams -> hashes, and the number of the text and the position of each
        self._added: dict[int, list[tuple[np.ndarray, int]]] = defaultdict(list)
        self._tables: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
        self._common = 0

    def __len__(self) -> int:
        """Texts that are looked for."""
        return len(self._words)

    @property
    def common(self) -> int:
        """Return how many n-grams are not looked for because more than ``most_items`` items have them."""
        self._build()
        return self._common

    def add(self, item: int, text: str) -> bool:
        """Add a text of an item, which may have several. Returns whether it is looked for."""
        found = words(text)
        length = min(self.n, len(found))
        if length < self.least_words:
            self.too_short += 1
            return False
        self._added[length].append((ngram_hashes(found, length), len(self._words)))
        self._words.append((item, tuple(found)))
        self._tables = None
        return True

    def find(self, text: str) -> list[Overlap]:
        """Return one overlap for each item that shares an n-gram with a text, in the order of the items."""
        found = words(text)
        overlaps: dict[int, Overlap] = {}
        for length, (hashes, texts, starts) in self._build().items():
            wanted = ngram_hashes(found, length)
            first = np.searchsorted(hashes, wanted, "left")
            last = np.searchsorted(hashes, wanted, "right")
            for start in np.nonzero(last > first)[0].tolist():
                shared = tuple(found[start : start + length])
                for at in range(first[start], last[start]):
                    item, of_item = self._words[texts[at]]
                    if item not in overlaps and of_item[starts[at] : starts[at] + length] == shared:
                        overlaps[item] = Overlap(item, " ".join(shared), start)
        return [overlaps[item] for item in sorted(overlaps)]

    def _build(self) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Length -> sorted hashes with their texts and positions."""
        if self._tables is None:
            self._tables, self._common = {}, 0
            items = np.array([item for item, _ in self._words], np.int64)
            for length, added in sorted(self._added.items()):
                hashes = np.concatenate([one for one, _ in added])
                texts = np.repeat(np.array([number for _, number in added]), [len(one) for one, _ in added])
                starts = np.concatenate([np.arange(len(one)) for one, _ in added])
                keep = self._rare(hashes, items[texts])
                order = np.flatnonzero(keep)[np.argsort(hashes[keep], kind="stable")]
                self._tables[length] = (hashes[order], texts[order], starts[order])
        return self._tables

    def _rare(self, hashes: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Which n-grams at most ``most_items`` items have."""
        distinct, which = np.unique(hashes, return_inverse=True)
        pairs = np.unique(np.stack([which.astype(np.int64), items]), axis=1)
        rare = np.bincount(pairs[0], minlength=len(distinct)) <= self.most_items
        self._common += int((~rare).sum())
        return rare[which]


def shingles(text: str) -> UInt64[np.ndarray, " n"]:
    """Return the hashes of the different runs of five words of a text; of a shorter one that of all its words."""
    found = words(text)
    return np.unique(ngram_hashes(found, min(SHINGLE_WORDS, len(found)))) if found else np.zeros(0, np.uint64)


def jaccard(a: UInt64[np.ndarray, " a"], b: UInt64[np.ndarray, " b"]) -> float:
    """Return the share of the shingles of two texts that both have; 0 if neither has any."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(len(a) + len(b) - shared, 1)


@functools.cache
def _permutations() -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.Generator(np.random.PCG64(_SEED)).integers(0, 1 << 63, (2, KEYS * _ROWS), np.uint64)
    return drawn[0] * np.uint64(2) + np.uint64(1), drawn[1]


def minhash_keys(of: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " bands"]:
    """Return the keys under which texts with many shingles in common meet: 32, each of 4 minima.

    Two texts share a key with probability 1 - (1 - J^4)^32, where J is their `jaccard`: all but 1 of 20 million pairs
    at 0.8, 87 % at 0.5.

    Args:
      of: shingles of a text, at least one.
    """
    odd, added = _permutations()
    lowest = np.full(len(odd), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(of), 512):
        lowest = np.minimum(lowest, _mixed(of[start : start + 512, None] * odd + added).min(axis=0))
    keys = np.arange(KEYS, dtype=np.uint64)
    for column in lowest.reshape(KEYS, _ROWS).T:
        keys = _mixed(keys * _MULTIPLIER + column)
    return keys

"""Shared words are found exactly as comparing every n-gram with every other finds them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from jvlm.data.prepare.ngrams import NgramIndex, jaccard, minhash_keys, ngram_hashes, normalized, shingles, words

VOCABULARY = [f"w{i}" for i in range(40)]


def _texts(seed: int, count: int, length: tuple[int, int]) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(VOCABULARY, k=rng.randint(*length))) for _ in range(count)]


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    found = text.split()
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


@pytest.mark.parametrize("n", [2, 3])
def test_an_index_finds_the_items_that_brute_force_finds(n):
    items, texts = _texts(0, 30, (n, 30)), _texts(1, 200, (0, 40))
    index = NgramIndex(n, least_words=n, most_items=10**6)
    for number, item in enumerate(items):
        index.add(number, item)
    hits = 0
    for text in texts:
        expected = {number for number, item in enumerate(items) if _grams(item, n) & _grams(text, n)}
        found = index.find(text)
        assert {overlap.item for overlap in found} == expected
        for overlap in found:
            assert overlap.text.split() == text.split()[overlap.start : overlap.start + n]
        hits += len(expected)
    assert 0 < hits < len(items) * len(texts)


def test_common_ngrams_are_counted_and_not_looked_for():
    items = [
        f"answer with a single word please {VOCABULARY[i]} {VOCABULARY[i + 1]} {VOCABULARY[i + 2]}" for i in range(8)
    ]
    index = NgramIndex(3, least_words=3, most_items=4)
    for number, item in enumerate(items):
        index.add(number, item)
    assert not index.find("answer with a single word please")
    assert [overlap.item for overlap in index.find("w3 w4 w5")] == [3]
    # four runs of three of the six common words; "word please w0" and so on are of one item each
    assert index.common == 4


def test_an_item_shorter_than_an_ngram_is_found_whole_or_counted_as_too_short():
    index = NgramIndex(13, least_words=4)
    assert index.add(0, "What is the total price?")
    assert not index.add(1, "Why so?")
    assert index.too_short == 1
    assert [o.item for o in index.find("tell me: WHAT is  the total - price, please")] == [0]
    assert not index.find("what is the total cost")


def test_words_are_the_same_in_any_case_width_and_punctuation_and_characters_without_spaces_are_words():
    assert words("\uff23af\u00e9, \ufb01ne!  don't_stop") == ["café", "fine", "don", "t", "stop"]
    assert words("東京タワー is 333 m") == [*"東京タワー", "is", "333", "m"]
    assert normalized("A  b.\nC") == "a b c"


def test_hashes_of_equal_ngrams_are_equal_and_of_others_differ():
    sequence = [random.Random(2).choice(VOCABULARY) for _ in range(5000)]
    hashes = ngram_hashes(sequence, 4)
    by_words: dict[tuple[str, ...], int] = {}
    for i, value in enumerate(hashes.tolist()):
        assert by_words.setdefault(tuple(sequence[i : i + 4]), value) == value
    assert len(set(by_words.values())) == len(by_words)
    assert len(hashes) == 4997
    assert len(ngram_hashes(sequence[:3], 4)) == 0
    # the same in every process and version: computed by hand with Python's integers
    assert ngram_hashes(["a"], 1).tolist() == [_by_hand(["a"])]
    assert ngram_hashes(["a", "b", "c"], 3).tolist() == [_by_hand(["a", "b", "c"])]


def _by_hand(of: list[str]) -> int:
    import hashlib

    total, whole = 0, (1 << 64) - 1
    for word in of:
        total = total * 0x9E3779B97F4A7C15 + int.from_bytes(
            hashlib.blake2b(word.encode(), digest_size=8).digest(), "little"
        )
        total &= whole
    total = ((total ^ (total >> 30)) * 0xBF58476D1CE4E5B9) & whole
    total = ((total ^ (total >> 27)) * 0x94D049BB133111EB) & whole
    return total ^ (total >> 31)


def test_jaccard_is_that_of_sets_of_runs_of_five_words():
    a, b = _texts(3, 1, (60, 60))[0], _texts(4, 1, (30, 30))[0]
    mixed = f"{a} {b}"
    expected = len(_grams(a, 5) & _grams(mixed, 5)) / len(_grams(a, 5) | _grams(mixed, 5))
    assert jaccard(shingles(a), shingles(mixed)) == pytest.approx(expected)
    assert jaccard(shingles(""), shingles("")) == 0


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_minhash_keys_meet_as_often_as_the_theory_says(target):
    rng = np.random.default_rng(5)
    size, pairs, met = 60, 300, 0
    shared = round(2 * size * target / (1 + target))
    actual = shared / (2 * size - shared)
    for _ in range(pairs):
        drawn = rng.integers(0, 2**63, 2 * size - shared, np.uint64)
        a, b = drawn[:size], drawn[size - shared :]
        met += bool((minhash_keys(a) == minhash_keys(b)).any())
    expected = 1 - (1 - actual**4) ** 32
    assert abs(met / pairs - expected) < 4 * (expected * (1 - expected) / pairs) ** 0.5 + 1e-9

"""Reading comprehension: token F1 of SQuAD (WebSRC) and DROP."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment


def squad_f1(answer: str, golds: Sequence[str], *, sets: bool = False) -> float:
    """Return the best F1 of the tokens of the answer and one of ``golds`` (arXiv 1606.05250).

    Args:
      sets: count each word once, as lmms-eval does for WebSRC.
    """
    return max((_f1(_squad_tokens(answer), _squad_tokens(gold), sets) for gold in golds), default=0.0)


def squad_exact(answer: str, golds: Sequence[str]) -> float:
    """Return 1 if the answer has the tokens of one of ``golds``."""
    return float(any(_squad_tokens(answer) == _squad_tokens(gold) for gold in golds))


def _squad_tokens(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _f1(given: list[str], expected: list[str], sets: bool) -> float:
    if not given or not expected:
        return float(given == expected)
    counts = (Counter(set(given)), Counter(set(expected))) if sets else (Counter(given), Counter(expected))
    both = (counts[0] & counts[1]).total()
    return 2 * both / (counts[0].total() + counts[1].total())


def drop_f1(answer: Sequence[str], golds: Sequence[Sequence[str]]) -> float:
    """Return the best F1 of DROP (arXiv 1903.00161): spans are assigned one to one, and their numbers must agree.

    Args:
      answer: its spans.
      golds: the spans of each reference.
    """
    return max((_drop(answer, gold) for gold in golds), default=0.0)


def _drop(answer: Sequence[str], gold: Sequence[str]) -> float:
    given, expected = [_bag(span) for span in answer], [_bag(span) for span in gold]
    if not given or not expected:
        return float(not given and not expected)
    table = np.array(
        [[_bag_f1(one, other) if _numbers_agree(one, other) else 0.0 for other in given] for one in expected]
    )
    pairs = linear_sum_assignment(-table)
    return round(float(table[pairs].sum()) / max(table.shape), 2)


def _bag(span: str) -> set[str]:
    words = (_drop_word(word) for word in re.split(" |-", span))
    return {part for word in words for part in word.split()}


def _drop_word(word: str) -> str:
    word = word.lower()
    if not _is_number(word):
        word = "".join(letter for letter in word if letter not in string.punctuation)
    word = str(float(word)) if _is_number(word) else word
    return re.sub(r"\b(a|an|the)\b", " ", word).strip()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers_agree(gold: set[str], given: set[str]) -> bool:
    numbers = {word for word in gold if _is_number(word)}
    return not numbers or bool(numbers & {word for word in given if _is_number(word)})


def _bag_f1(gold: set[str], given: set[str]) -> float:
    both = len(gold & given)
    precision = both / len(given) if given else 1.0
    recall = both / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

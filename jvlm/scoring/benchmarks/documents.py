"""Questions about documents and charts: ANLS (DocVQA, InfoVQA), relaxed accuracy (ChartQA), OCRBench."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from jvlm.scoring.answers import normalise
from jvlm.scoring.extras import require


def anls(answer: str, golds: Sequence[str], *, threshold: float = 0.5) -> float:
    """Return the average normalised Levenshtein similarity to the nearest of ``golds`` (arXiv 1907.00490).

    Case and runs of white space do not count. As in the code that published scores come from, the distance is divided
    by the length of the longer text before that.
    """
    levenshtein = require("rapidfuzz.distance").Levenshtein
    best = 0.0
    for gold in golds:
        longest = max(len(gold), len(answer))
        distance = levenshtein.distance(_plain(gold), _plain(answer))
        best = max(best, 1 - distance / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().split())


def relaxed(answer: str, golds: Sequence[str], *, tolerance: float = 0.05) -> float:
    """Return 1 if a number is within 5 % of one of ``golds``, or a text equals one but for case (arXiv 2203.10244).

    "12%" is 0.12. A reference of 0 needs the same text. Nothing else is taken off: "12 kg" is a text.
    """
    return float(any(_relaxed(answer.strip(), gold.strip(), tolerance) for gold in golds))


def _relaxed(answer: str, gold: str, tolerance: float) -> bool:
    given, expected = _float(answer), _float(gold)
    if given is not None and expected:
        return abs(given - expected) / abs(expected) <= tolerance
    return answer.lower() == gold.lower()


def _float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def table_answer(answer: str, golds: Sequence[str]) -> float:
    """Return 1 if the answer has all values of ``golds`` and no other, in any order (WikiTableQuestions, 1508.00305).

    Values are divided by commas, semicolons, bars, "and" or new lines where the reference has several; numbers are
    compared as numbers, texts but for case, outer punctuation and accents.
    """
    expected = sorted(map(_value, golds))
    if len(golds) == 1:
        return float(_value(answer) == expected[0])
    forms = (r"\n", r"\s*\|\s*", r";", r",(?!\d{3}\b)|\band\b|\n|;|\|")
    given = (sorted(_value(part) for part in re.split(form, answer) if part.strip()) for form in forms)
    return float(expected in list(given))


def _value(text: str) -> str:
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    bare = normalise(bare)
    number = re.fullmatch(r"[$\u20ac\u00a3]?\s*([-+]?\d[\d,]*(?:\.\d+)?)", bare)
    return f"{float(number[1].replace(',', '')):.6g}" if number else bare


def ocrbench(answer: str, golds: Sequence[str], *, formula: bool = False) -> float:
    """Return 1 if one of ``golds`` is part of the answer (arXiv 2305.07895).

    Args:
      formula: for its handwritten formulas (HME100k): no white space counts, case does.
    """
    if formula:
        return float(any("".join(gold.split()) in "".join(answer.split()) for gold in golds))
    content = answer.lower().strip().replace("\n", " ")
    return float(any(gold.lower().strip().replace("\n", " ") in content for gold in golds))

"""How many: one whole number."""

from __future__ import annotations

import re

from jvlm.scoring.answers import answer
from jvlm.scoring.score import Score

MOST = 10**6
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
NUMBERS = {word: number for number, word in enumerate(_WORDS)}
_NUMBER = re.compile(
    rf"(?<![\w.])[-\u2212]?\d{{1,3}}(?:,\d{{3}})+(?![\d,])|(?<![\w.])[-\u2212]?\d+(?:\.\d+)?(?!\w)|\b(?:{'|'.join(_WORDS)})\b",
    re.IGNORECASE,
)


def count(text: str, gold: int, *, shaped: bool = False, thinking_opened: bool = False) -> Score:
    """Return 1 if the only number of the answer is ``gold``; words up to twenty are numbers too.

    Args:
      shaped: give 1 - |number - gold| / max(gold, 1) to others, not below 0.
    """
    content = answer(text, thinking_opened=thinking_opened)
    if isinstance(content, Score):
        return content
    found = _NUMBER.findall(content)
    if len(found) != 1:
        return Score(0.0, "several_answers" if found else "unparsed", found or None)
    number = whole(found[0])
    if number is None:
        return Score(0.0, "out_of_range", found[0][:20])
    if shaped:
        return Score(max(1 - abs(number - gold) / max(gold, 1), 0.0), "ok", number)
    return Score.of(number == gold, number)


def whole(text: str) -> int | None:
    """Return a whole number from 0 to a million that is written in digits or as a word; None for others."""
    text = text.casefold().replace(",", "")
    if text in NUMBERS:
        return NUMBERS[text]
    digits, _, rest = text.partition(".")
    if not digits.isdigit() or rest.strip("0") or len(digits.lstrip("0")) > 7 or int(digits) > MOST:
        return None
    return int(digits)

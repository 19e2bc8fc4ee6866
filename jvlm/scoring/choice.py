"""Multiple choice: exactly one letter, or exactly one option's text."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from jvlm.scoring.answers import answer, normalise
from jvlm.scoring.score import Score

_LEAD = re.compile(r".*\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*(.+)", re.DOTALL | re.IGNORECASE)
# "A cat sits here" and "I see" begin with a word, not with a letter of an option
_WORD = re.compile(r"(?<!\w)[AI](?=\s+(?!(?:and|or|because|since)\b)[a-z])")
_BEFORE = re.compile(r"(?:\bis|\bchoose|\bpick|\boption|\banswer|\bchoice|:)\s*$", re.IGNORECASE)


def choice(text: str, gold: str, options: Sequence[str] = (), *, thinking_opened: bool = False) -> Score:
    """Return 1 if the answer is ``gold``: its letter, its option's text, or both.

    Args:
      gold: a letter, or several for questions with several right options ("AC"), which then must all be given.
      options: their texts, of A, B, ...; without texts only letters are understood, up to J.
    """
    content = answer(text, thinking_opened=thinking_opened)
    if isinstance(content, Score):
        return content
    letters = string.ascii_uppercase[: len(options) or 10]
    given = _letters(content, letters)
    named = _option(content, options)
    several = len(gold) > 1
    if given and named is not None and letters[named] not in given:
        return Score(0.0, "contradiction", sorted(given))
    if not given and named is not None:
        given = {letters[named]}
    if not given or (len(given) > 1 and not several):
        return Score(0.0, "unparsed", sorted(given) or None)
    return Score.of(given == set(gold), "".join(sorted(given)))


def _letters(content: str, letters: str) -> set[str]:
    """Letters of options that stand alone."""
    bare = normalise(content)
    if len(bare) == 1:
        return {bare.upper()} & set(letters)
    content = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", content)
    words = {match.start() for match in _WORD.finditer(content) if not _BEFORE.search(content[: match.start()])}
    alone = re.finditer(r"(?<![\w'\u2019])[A-Z](?![\w'\u2019])", content)
    return {match[0] for match in alone if match.start() not in words and match[0] in letters}


def _option(content: str, options: Sequence[str]) -> int | None:
    """Return the one option whose text the answer is, after its letter or words that lead to it."""
    rest = re.sub(r"^\W*[A-Z]\s*[.):,-]+\s*", "", content)
    lead = _LEAD.fullmatch(rest)
    forms = {normalise(rest), normalise(content), *((normalise(lead[1]),) if lead else ())}
    if lead:
        forms.add(normalise(re.sub(r"^\W*[A-Z]\s*[.):,-]+\s*", "", lead[1])))
    found = [number for number, option in enumerate(options) if normalise(option) in forms - {""}]
    return found[0] if len(found) == 1 else None

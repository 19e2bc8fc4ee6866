"""Multiple choice: exactly one letter, or exactly one option's text."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from jvlm.scoring.answers import answer, normalise
from jvlm.scoring.score import Score

_LEAD = re.compile(
    r".*(?:\b(?:answer|option|choice)\b(?:\s+is)?|\u7b54\u6848[\u662f\u4e3a]?)\s*[:\uff1a]?\s*(.+)",
    re.DOTALL | re.IGNORECASE,
)
# "A cat sits here" and "I see" begin with a word, not with a letter of an option
_WORD = re.compile(r"(?<!\w)[AI](?=\s+(?!(?:and|or|because|since)\b)[a-z])")
# words that say which letter is the answer, where others stand beside it, but not as one of a list
_CONCLUDES = re.compile(
    r"\b(?:answer|option|choice)\s*(?:(?:is|would be|must be|should be)\b\s*:?|:)\s*(?:option\b|choice\b)?[\s*_(\[\"']*"
    r"(?-i:([A-Z]))(?![\w'\u2019])"
    r"(?![\s*_)\].,]*(?:\bor\b|\band\b|\bnor\b|[/&])\W*(?-i:[A-HJ-Z])(?!\w))"
    r"(?!\)?,\s*\(?(?-i:[A-HJ-Z])(?!\w))",
    re.IGNORECASE,
)
# the same in Chinese, whose letters stand between characters without spaces
_HAN = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_BEGINS, _ENDS = rf"(?<![^\W{_HAN}])", rf"(?![^\W{_HAN}])"
_CONCLUDES_IN_CHINESE = re.compile(
    rf"\u7b54\u6848\s*(?:\u5e94\u8be5|\u5e94)?[\u662f\u4e3a\u9009]?\s*[:\uff1a]?[\s*_(\uff08\[\"']*([A-Z]){_ENDS}"
    r"(?![\s*_)\uff09\]]*[\u3001,\uff0c/&\u6216\u548c\u4e0e]\s*[(\uff08]?[A-Z](?![A-Za-z]))"
)
_DENIED = re.compile(
    r"(?:\bnot|n['\u2019]t(?:\s+be)?|\u4e0d\u662f|\u4e0d\u9009)[\s*_(\[\"']*(?:(?:option|choice)[\s*_(\[\"']*)?$",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\b(?:not|no|nor|neither|never|none|except|cannot)\b|n['\u2019]t\b", re.IGNORECASE)
_BEFORE = re.compile(r"(?:\bis|\bchoose|\bpick|\boption|\banswer|\bchoice|:)\s*$", re.IGNORECASE)


def choice(
    text: str, gold: str, options: Sequence[str] = (), *, thinking_opened: bool = False, prose: bool = False
) -> Score:
    """Return 1 if the answer is ``gold``: its letter, its option's text, or both.

    Args:
      gold: a letter, or several for questions with several right options ("AC"), which then must all be given.
      options: their texts, of A, B, ...; without texts only letters are understood, up to J.
      prose: whether sentences are understood too, as those who evaluate models do and rewards must not: of several
        letters the one that "the answer is", or that is all of the last or first line; a single one unless it is
        denied ("not B"); without letters the only option whose text a short answer holds, unless it denies something.
    """
    content = answer(text, thinking_opened=thinking_opened)
    if isinstance(content, Score):
        return content
    letters = string.ascii_uppercase[: len(options) or 10]
    outside = _outside(content, options)
    given = _letters(outside, letters)
    if prose and len(given) == 1 and _denies(outside, *given):
        return Score(0.0, "unparsed", sorted(given))
    named = _option(content, options)
    several = len(gold) > 1
    if given and named is not None and letters[named] not in given:
        return Score(0.0, "contradiction", sorted(given))
    if not given and named is None and prose:
        named = _held(content, options)
    if not given and named is not None:
        given = {letters[named]}
    if len(given) > 1 and not several and prose:
        given = _concluded(outside, letters) or given
    if not given or (len(given) > 1 and not several):
        return Score(0.0, "unparsed", sorted(given) or None)
    return Score.of(given == set(gold), "".join(sorted(given)))


def _outside(content: str, options: Sequence[str]) -> str:
    """Return an answer without the texts of options and the hours of clocks: a letter in them ("8:45 A.M.") is none."""
    texts = sorted((one.strip() for one in options if len(normalise(one)) > 1), key=len, reverse=True)
    for one in (*map(re.escape, texts), r"[AP]\.\s?M\.?"):
        content = re.sub(rf"{_BEGINS}{one}{_ENDS}", " ", content, flags=re.IGNORECASE)
    return content


def _letters(content: str, letters: str) -> set[str]:
    """Letters of options that stand alone."""
    bare = normalise(content)
    if len(bare) == 1:
        return {bare.upper()} & set(letters)
    content = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", content)
    words = {match.start() for match in _WORD.finditer(content) if not _BEFORE.search(content[: match.start()])}
    alone = re.finditer(rf"{_BEGINS}(?<!['\u2019])[A-Z](?!['\u2019]){_ENDS}", content)
    return {match[0] for match in alone if match.start() not in words and match[0] in letters}


def _denies(content: str, letter: str) -> bool:
    """Return whether a letter stands behind "not" wherever it stands alone."""
    alone = [match.start() for match in re.finditer(rf"{_BEGINS}{letter}{_ENDS}", content)]
    return bool(alone) and all(_DENIED.search(content[:start]) for start in alone)


def _concluded(content: str, letters: str) -> set[str]:
    """Return the letter that the answer is said to be, else the one that is all of the last or the first line."""
    found = (*_CONCLUDES.findall(content), *_CONCLUDES_IN_CHINESE.findall(content))
    said = {letter for letter in found if letter in letters}
    if said:
        return said if len(said) == 1 else set()
    lines = content.strip().split("\n") if "\n" in content else []
    bare = (normalise(line).upper() for line in (*lines[-1:], *lines[:1]))
    return next(({letter} for letter in bare if len(letter) == 1 and letter in letters), set())


def _held(content: str, options: Sequence[str]) -> int | None:
    """Return the one option that a short answer has in its words; None for several, and for what is denied."""
    if _NEGATED.search(content) or len(content) > 2 * sum(map(len, options)):
        return None
    words = f" {_words(content)} "
    found = {number: _words(option) for number, option in enumerate(options)}
    found = {number: option for number, option in found.items() if option and f" {option} " in words}
    longest = [n for n, one in found.items() if not any(f" {one} " in f" {o} " for k, o in found.items() if k != n)]
    return longest[0] if len(longest) == 1 else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[\w.%+-]*\w[\w%]*|[\w%]+", normalise(text)))


def _option(content: str, options: Sequence[str]) -> int | None:
    """Return the one option whose text the answer is, after its letter or words that lead to it."""
    rest = re.sub(r"^\W*[A-Z]\s*[.):,-]+\s*", "", content)
    lead = _LEAD.fullmatch(rest)
    forms = {normalise(rest), normalise(content), *((normalise(lead[1]),) if lead else ())}
    if lead:
        forms.add(normalise(re.sub(r"^\W*[A-Z]\s*[.):,-]+\s*", "", lead[1])))
    found = [number for number, option in enumerate(options) if normalise(option) in forms - {""}]
    return found[0] if len(found) == 1 else None

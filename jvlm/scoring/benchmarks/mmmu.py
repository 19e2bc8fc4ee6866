"""MMMU (arXiv 2311.16502): what its own code reads from an answer, without its guess where there is nothing to read."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from jvlm.scoring.score import Score

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_choice(answer: str, gold: str, options: Sequence[str]) -> Score:
    """Return 1 if the option that the answer names last is ``gold``.

    It is looked for as "(A)", else as the word "A", else, in answers of more than five words, by an option's text.
    Where there is none the official code draws an option at random. Here "A." is looked for then, as lmms-eval does,
    and an answer without it is "unparsed", and 0.
    """
    letters = string.ascii_uppercase[: len(options)]
    content = answer
    for mark in ",.!?;:'":
        content = content.strip(mark)
    content = f" {content} "
    for form in ("({})", " {} "):
        positions = {letter: content.rfind(form.format(letter)) for letter in letters}
        if max(positions.values()) >= 0:
            return _last(positions, gold)
    if len(content.split()) > 5:
        positions = {letter: content.lower().rfind(text.lower()) for letter, text in zip(letters, options, strict=True)}
        if max(positions.values()) >= 0:
            return _last(positions, gold)
    positions = {letter: content.rfind(f" {letter}.") for letter in letters}
    return _last(positions, gold) if max(positions.values()) >= 0 else Score(0.0, "unparsed")


def _last(positions: Mapping[str, int], gold: str) -> Score:
    letter = max(positions, key=lambda letter: positions[letter])
    return Score.of(letter == gold, letter)


def mmmu_open(answer: str, golds: Sequence[str]) -> Score:
    """Return 1 if a text of ``golds`` is part of what the answer comes to, or a number of them is equal to two digits.

    What it comes to: of each line the shortest part after "is", "so", "answer" and the like (in the last line also
    "="), and every number in these.
    """
    candidates = [value for part in _conclusions(answer) for text in (part, *_numbers(part)) for value in _values(text)]
    expected = [value for gold in golds for value in _values(gold)]
    right = any(
        any(isinstance(e, str) and e in given for e in expected) if isinstance(given, str) else given in expected
        for given in candidates
    )
    return Score.of(right, candidates[0] if candidates else None)


def _conclusions(answer: str) -> list[str]:
    answer = answer.strip().strip(".").lower()
    lines = answer.split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        keys = (*_KEYS, "=") if number == len(lines) else _KEYS
        tails = [line.split(key)[-1].strip() for key in keys if key in line]
        tails = [tail for tail in tails if tail]
        if tails and (shortest := min(tails, key=len)) not in ":,.!?;'":
            found.append(shortest)
    return found or [answer]


def _numbers(text: str) -> list[str]:
    return [found for pattern in _NUMBERS for found in re.findall(pattern, text)]


def _values(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]

"""MathVista (arXiv 2310.02255) and DynaMath (arXiv 2411.00836): options, whole numbers, decimals, lists."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

from jvlm.scoring.answers import normalise
from jvlm.scoring.choice import choice
from jvlm.scoring.extras import require
from jvlm.scoring.score import Score

_NUMBER = re.compile(r"(?<![\w.])[-\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w])")
_LEAD = re.compile(r"\b(?:answer|result|value)\b[^.\n]{0,40}?(?:\bis\b|:|=)\s*(.+)|(?:=|\bis\b)\s*(.+)", re.IGNORECASE)
_FRACTION = re.compile(r"(-?)\\[dt]?frac\s*\{\s*(\d+(?:\.\d+)?)\s*\}\s*\{\s*(\d+(?:\.\d+)?)\s*\}")
_PLAIN_FRACTION = re.compile(r"(-?\d+)\s*/\s*(\d+)")
_TOLERANCE = 0.001  # DynaMath's


def mathvista(
    text: str,
    gold: str,
    *,
    question_type: str = "free_form",
    answer_type: str = "text",
    precision: float | None = None,
    options: Sequence[str] = (),
) -> Score:
    """Return 1 if an answer is right by MathVista's comparison.

    Its authors have a language model extract the answer from a reply first. Here it is the only number of the reply, or
    of what follows the last "answer is", "=" and the like; an answer that this does not find is "unparsed".

    Args:
      precision: decimals that a decimal number is rounded to.
      options: texts of the options; the gold is one of them, or its letter.
    """
    if question_type == "multi_choice" and options:
        letters = string.ascii_uppercase
        right = letters[list(options).index(gold)] if gold in options else gold
        score = choice(text, right, options, prose=True)
        if score.reason != "unparsed" or score.parsed is not None or len(text) > 60:
            return score
        nearest = _nearest(text, options)
        return Score.of(letters[nearest] == right, letters[nearest])
    if answer_type == "list":
        given, expected = _list(text), _list(gold)
        return Score(0.0, "unparsed") if given is None else Score.of(given == expected, given)
    if answer_type not in ("integer", "float"):
        return Score.of(normalise(text) == normalise(gold), normalise(text))
    number = only_number(text)
    if number is None:
        return Score(0.0, "unparsed")
    expected_number = float(gold.replace(",", ""))
    if answer_type == "integer":
        return Score.of(int(number) == int(expected_number), number)
    digits = int(precision or 0)
    return Score.of(round(number, digits) == round(expected_number, digits), number)


def dynamath(text: str, gold: str, answer_type: str) -> Score:
    """Return 1 if a number is within 0.001 of the right one, or a letter or text is the right one."""
    if answer_type == "multiple choice":
        return choice(text, gold.strip("() ").upper(), prose=True)
    if answer_type != "float":
        return Score.of(normalise(text) == normalise(gold), normalise(text))
    number = only_number(text)
    if number is None:
        return Score(0.0, "unparsed")
    return Score.of(abs(number - float(gold)) <= _TOLERANCE, number)


def only_number(text: str) -> float | None:
    """Return the only number of a text, or of what follows its last "answer is", "=" and the like; None else."""
    lead = [match[1] or match[2] for match in _LEAD.finditer(text)]
    for part in (text, *reversed(lead)):
        values = _values(part)
        if len(values) == 1:
            return values[0]
    return None


def _values(text: str) -> list[float]:
    found = []
    for form in (_FRACTION, _PLAIN_FRACTION):
        for match in form.finditer(text):
            sign, top, bottom = match.groups() if len(match.groups()) == 3 else ("", *match.groups())
            if float(bottom):
                found.append((-1 if sign else 1) * float(top) / float(bottom))
        text = form.sub(" ", text)
    for match in _NUMBER.finditer(text.replace("\u2212", "-")):
        if any(letter.isdigit() for letter in match[0]):
            value = float(match[0].replace(",", ""))
            found += [value] if math.isfinite(value) else []
    return found


def _list(text: str) -> list[float] | None:
    found = re.findall(r"\[([^\[\]]*)\]", text)
    if len(found) != 1:
        return None
    try:
        return [float(part) for part in found[0].split(",")]
    except ValueError:
        return None


def _nearest(text: str, options: Sequence[str]) -> int:
    levenshtein = require("rapidfuzz.distance").Levenshtein
    return min(range(len(options)), key=lambda i: levenshtein.distance(text, options[i]))

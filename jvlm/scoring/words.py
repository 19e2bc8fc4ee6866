"""Answers in words."""

from __future__ import annotations

from collections.abc import Sequence

from jvlm.scoring.answers import answer, normalise
from jvlm.scoring.score import Score


def words(text: str, golds: Sequence[str], *, thinking_opened: bool = False) -> Score:
    """Return 1 if the answer equals one of ``golds`` but for case, outer punctuation and marks of LaTeX or Markdown."""
    content = answer(text, thinking_opened=thinking_opened)
    if isinstance(content, Score):
        return content
    given = normalise(content)
    if not given:
        return Score(0.0, "unparsed")
    return Score.of(given in map(normalise, golds), given)

"""Which part of a model's text is its answer."""

from __future__ import annotations

import re
import unicodedata

from jvlm.scoring.score import Score

LONGEST = 20_000  # characters of an answer that are looked at
_OPEN, _CLOSE = "<think>", "</think>"
_BOX = re.compile(r"\\boxed\s*\{")


def spoken(text: str, *, thinking_opened: bool = False, as_written: bool = False) -> str | Score:
    """Return what stands after the thinking part, or a `Score` of 0 if there is nothing but thinking.

    Args:
      thinking_opened: whether the prompt ended with an opened ``<think>``.
      as_written: keep the characters that NFKC has plainer ones for, for what compares texts letter by letter: "m²" is
        not "m2" then, and full-width signs stay.
    """
    _, closed, after = text.rpartition(_CLOSE)
    if _OPEN in after or (thinking_opened and not closed):
        return Score(0.0, "thinking_only")
    after = after[-LONGEST:]
    after = (after if as_written else unicodedata.normalize("NFKC", after)).strip()
    return after or Score(0.0, "empty")


def answer(text: str, *, thinking_opened: bool = False, as_written: bool = False) -> str | Score:
    """Return the contents of the last ``\\boxed{}`` after the thinking part, or all of it if there is none.

    Of nested boxes it is the innermost; one that is never closed is none. Arguments are those of `spoken`.
    """
    content = spoken(text, thinking_opened=thinking_opened, as_written=as_written)
    if isinstance(content, Score):
        return content
    boxed = last_boxed(content)
    return content if boxed is None else boxed


def last_boxed(text: str) -> str | None:
    """Return the contents of the last closed ``\\boxed{}``; None if there is none."""
    for match in reversed(list(_BOX.finditer(text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            if depth == 0:
                return text[match.end() : end].strip()
    return None


_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit)\s*\{([^{}]*)\}")
_MARKS = re.compile(r"\*\*|__|`|\$")
_OUTER = " \t\n\r.,;:!?\"'\u201c\u201d\u2018\u2019«»()[]{}*_`\u3001\u3002\u300c\u300d\u3010\u3011"


def normalise(text: str) -> str:
    """Return a text for comparison: NFKC, no LaTeX text commands and Markdown marks, one case, no outer punctuation."""
    text = _MARKS.sub("", _TEXT.sub(r"\1", unicodedata.normalize("NFKC", text)))
    return " ".join(text.casefold().split()).strip(_OUTER)

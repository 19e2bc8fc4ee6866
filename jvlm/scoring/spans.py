"""When: one span of a video."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jvlm.scoring.answers import answer
from jvlm.scoring.score import Score

_CLOCK = r"(?:\d{1,2}:)?\d{1,2}:\d{2}(?:\.\d+)?"
_SECONDS = r"\d{1,6}(?:\.\d+)?"


def span(text: str, gold: Sequence[float], *, strict: bool = True, thinking_opened: bool = False) -> Score:
    """Return the IoU of ``gold`` and the answer's only ``[mm:ss, mm:ss]``, or ``[hh:mm:ss, hh:mm:ss]``.

    Args:
      gold: (start, end) in seconds.
      strict: whether plain seconds, ``[5.0, 10]``, are no answer.
    """
    content = answer(text, thinking_opened=thinking_opened)
    if isinstance(content, Score):
        return content
    time = _CLOCK if strict else f"{_CLOCK}|{_SECONDS}"
    found = re.findall(rf"\[\s*({time})\s*,\s*({time})\s*\]", content)
    if len(found) != 1:
        return Score(0.0, "several_answers" if found else "unparsed")
    start, end = map(seconds, found[0])
    if start > end:
        return Score(0.0, "out_of_range", (start, end))
    return Score(temporal_iou((start, end), gold), "ok", (start, end))


def seconds(text: str) -> float:
    """Return the seconds of "ss", "mm:ss" or "hh:mm:ss"."""
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total


def temporal_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return intersection over union of two spans (start, end); 0 for spans without length."""
    both = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    union = max(a[1], b[1]) - min(a[0], b[0])
    return both / union if union > 0 else 0.0

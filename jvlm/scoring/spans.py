"""When: one span of a video."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jvlm.data.time_formats import CLOCK, SECONDS, in_seconds, temporal_iou
from jvlm.scoring.answers import answer
from jvlm.scoring.score import Score


def span(text: str, gold: Sequence[float], *, strict: bool = True, thinking_opened: bool = False) -> Score:
    """Return the IoU of ``gold`` and the answer's only ``[mm:ss, mm:ss]``, or ``[hh:mm:ss, hh:mm:ss]``.

    Args:
      gold: (start, end) in seconds.
      strict: whether plain seconds, ``[5.0, 10]``, are no answer.
    """
    content = answer(text, thinking_opened=thinking_opened)
    if isinstance(content, Score):
        return content
    time = CLOCK if strict else f"{CLOCK}|{SECONDS}"
    found = re.findall(rf"\[\s*({time})\s*,\s*({time})\s*\]", content)
    if len(found) != 1:
        return Score(0.0, "several_answers" if found else "unparsed")
    start, end = map(in_seconds, found[0])
    if start > end:
        return Score(0.0, "out_of_range", (start, end))
    return Score(temporal_iou((start, end), gold), "ok", (start, end))

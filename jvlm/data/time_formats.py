"""Moments and spans of a video as text: written as the models were taught them, and read back from what they answer."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

TimeFormat = Literal["clock", "seconds", "frames"]

CLOCK = r"(?:\d{1,2}:)?\d{1,2}:\d{2}(?:\.\d+)?"
SECONDS = r"\d{1,6}(?:\.\d+)?"
_TIME = rf"(?:<\s*{SECONDS}\s+seconds\s*>|{CLOCK}|{SECONDS}\s*s(?:ec(?:onds?)?)?\b)"
# a pair in brackets, or one time alone that is no part of a longer number
_TIMES = re.compile(rf"\[\s*({_TIME})\s*,\s*({_TIME})\s*\]|(?<![\d:.])({_TIME})(?![\d:])")
_DIGITS = re.compile(rf"{CLOCK}|{SECONDS}")


@dataclasses.dataclass(frozen=True)
class _Form:
    """How the beginning and the end of a span are written; a moment is written as a beginning."""

    begin: Callable[[float], str]
    end: Callable[[float], str]


def _clock(seconds: int) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


# MiMo-VL's [mm:ss, mm:ss] in whole seconds, of which none of a span is lost at its beginning; tenths of a second; and
# tenths as some families have them before frames.
_FORMS: dict[TimeFormat, _Form] = {
    "clock": _Form(lambda t: _clock(math.floor(t)), lambda t: _clock(math.floor(t + 0.5))),
    "seconds": _Form(lambda t: f"{t:.1f}s", lambda t: f"{t:.1f}s"),
    "frames": _Form(lambda t: f"<{t:.1f} seconds>", lambda t: f"<{t:.1f} seconds>"),
}


def render(seconds: Sequence[float], form: TimeFormat) -> str:
    """Return the text of a moment, one number, or of a span, its beginning and its end in brackets.

    Raises:
      ValueError: other than one or two numbers, one that is negative or not finite, or an end before its beginning.
    """
    check(seconds)
    style = _FORMS[form]
    if len(seconds) == 1:
        return style.begin(seconds[0])
    return f"[{style.begin(seconds[0])}, {style.end(seconds[1])}]"


def check(seconds: Sequence[float]) -> None:
    """Raise ValueError for what is neither a moment nor a span."""
    if len(seconds) not in (1, 2) or not all(math.isfinite(one) and one >= 0 for one in seconds):
        raise ValueError(f"{list(seconds)} is no time: give one number of seconds, or a beginning and an end")
    if len(seconds) == 2 and seconds[0] > seconds[1]:
        raise ValueError(f"{list(seconds)} ends before it begins")


def parse(text: str) -> list[tuple[float, ...]]:
    """Return the moments and spans of a model's answer in seconds, in order; whatever form they are written in.

    What stands before the last ``</think>`` does not count, and numbers without a unit are no times. A span whose end
    is before its beginning is left out.
    """
    found = []
    for match in _TIMES.finditer(text.rpartition("</think>")[2]):
        times = tuple(in_seconds(one) for one in match.groups() if one is not None)
        if times == tuple(sorted(times)):
            found.append(times)
    return found


def in_seconds(text: str) -> float:
    """Return the seconds of "ss", "mm:ss", "h:mm:ss", "12.5s" or "<12.5 seconds>".

    Raises:
      ValueError: no time.
    """
    digits = _DIGITS.search(text)
    if digits is None:
        raise ValueError(f"{text!r} is no time")
    total = 0.0
    for part in digits[0].split(":"):
        total = total * 60 + float(part)
    return total


def temporal_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return intersection over union of two spans (start, end); 0 for spans without length."""
    both = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    union = max(a[1], b[1]) - min(a[0], b[0])
    return both / union if union > 0 else 0.0

"""What to do: one action of a graphical user interface, in MiMo-VL's form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jvlm.data.values import number
from jvlm.scoring.answers import answer, normalise
from jvlm.scoring.regions import holds
from jvlm.scoring.score import Score

# field of the reference -> field of the answer that must lie in it
_POINTS = {"box": "start_point", "end_box": "end_point"}


def action(text: str, gold: Mapping[str, Any], *, thinking_opened: bool = False) -> Score:
    """Return 1 if the answer is one action of the right kind, and every field of ``gold`` agrees.

    The answer is ``{"action": ..., ...}``, alone or in a list, as in MiMo-VL's table of actions (click, scroll, input,
    drag, open, press, finished, longpress, hover, select, wait, appswitch). A wrong field is named: "wrong_text".

    Args:
      gold: ``action``; ``box`` and ``end_box``, in which ``start_point`` and ``end_point`` must lie; and other fields
        of the action: texts are compared as `jvlm.scoring.answers.normalise` has them.
    """
    content = answer(text, thinking_opened=thinking_opened)
    if isinstance(content, Score):
        return content
    given = _read(content)
    if not given:
        return Score(0.0, "unparsed")
    if len(given) > 1:
        return Score(0.0, "several_answers", given)
    only = given[0]
    if only.get("action") != gold["action"]:
        return Score(0.0, "wrong_action", only)
    for field, expected in gold.items():
        if field in _POINTS:
            if not _lies_in(only.get(_POINTS[field]), expected):
                return Score(0.0, "wrong_point", only)
        elif field != "action" and not _equal(only.get(field), expected):
            return Score(0.0, f"wrong_{field}", only)
    return Score(1.0, "ok", only)


def _read(content: str) -> list[dict[str, Any]]:
    fenced = re.search(r"```(?:json)?\s*(.*?)```", content, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else content)
    except (ValueError, RecursionError):
        return []
    found = found if isinstance(found, list) else [found]
    return found if all(isinstance(item, dict) and isinstance(item.get("action"), str) for item in found) else []


def _lies_in(point: Any, box: Sequence[float]) -> bool:
    if not isinstance(point, list) or len(point) != 2 or any(number(value) is None for value in point):
        return False
    return holds(box, point)


def _equal(given: Any, expected: Any) -> bool:
    if isinstance(expected, str) and isinstance(given, str):
        return normalise(given) == normalise(expected)
    if isinstance(expected, list | tuple) and isinstance(given, list):
        return len(given) == len(expected) and all(map(_equal, given, expected))
    return type(given) is type(expected) and given == expected

"""EasyR1: a problem and the answer that a reward compares with."""

from __future__ import annotations

from typing import Any

from jvlm.data.errors import Origin
from jvlm.data.formats.example_format import Format, FormatOptions
from jvlm.data.formats.fields import Fields
from jvlm.data.values import is_null


def _matches(record: dict[str, Any]) -> bool:
    return not is_null(record.get("problem")) and not is_null(record.get("answer"))


def _convert(record: dict[str, Any], options: FormatOptions, origin: Origin) -> dict[str, Any]:
    fields = Fields(record, origin)
    problem, answer = fields.need_text("problem"), fields.need_text("answer")
    messages = [*fields.take_system(), {"role": "user", "content": problem}]
    if options.answer_as_turn:
        messages.append({"role": "assistant", "content": answer})
    return {"solution": answer, **fields.rest(), "messages": messages}


EASYR1 = Format("easyr1", "problem and answer", _matches, _convert)

"""TRL: a prompt and its completion, or a chosen and a rejected one; LLaMA-Factory's pairs of an instruction."""

from __future__ import annotations

from typing import Any

from jvlm.data.errors import Origin
from jvlm.data.formats.example_format import Format, FormatOptions
from jvlm.data.formats.fields import Fields
from jvlm.data.formats.messages import prompt_messages
from jvlm.data.values import is_null


def _matches(record: dict[str, Any]) -> bool:
    has = {name: not is_null(record.get(name)) for name in ("prompt", "completion", "chosen", "rejected")}
    return (has["prompt"] and has["completion"]) or (has["chosen"] and has["rejected"])


def _convert(record: dict[str, Any], options: FormatOptions, origin: Origin) -> dict[str, Any]:
    fields = Fields(record, origin)
    prompt = fields.take("prompt")
    if prompt is None and fields.first("instruction"):  # LLaMA-Factory's
        parts = [fields.take_text("instruction"), fields.take_text("input")]
        prompt = "\n".join(part for part in parts if part)
    messages = [] if prompt is None else prompt_messages(prompt, origin, "prompt", "user")
    system = fields.take_system()
    if fields.first("completion"):
        answer = prompt_messages(fields.take("completion"), origin, "completion", "assistant")
        return {**fields.rest(), "messages": [*system, *messages, *answer]}
    found = {}
    for name, field in (("chosen", "messages"), ("rejected", "rejected_messages")):
        answer = prompt_messages(fields.need(name)[1], origin, name, "assistant")
        found[field] = [*system, *messages, *answer]
    return {**fields.rest(), **found}


TRL = Format("trl", "prompt and completion, or chosen and rejected", _matches, _convert)

"""One question and its answer, under the names that ms-swift knows; and Alpaca's instruction, input and output."""

from __future__ import annotations

from typing import Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.formats.example_format import Format, FormatOptions
from jvlm.data.formats.fields import QUERY, RESPONSE, Fields, listed, text
from jvlm.data.formats.messages import prompt_messages
from jvlm.data.values import is_null, shown


def _has(record: dict[str, Any], *names: str) -> bool:
    return any(not is_null(record.get(name)) for name in names)


def _matches_alpaca(record: dict[str, Any]) -> bool:
    return _has(record, "instruction") and _has(record, "output")


def _convert_alpaca(record: dict[str, Any], options: FormatOptions, origin: Origin) -> dict[str, Any]:
    fields = Fields(record, origin)
    parts = [fields.take_text("instruction"), fields.take_text("input")]
    return _conversation(fields, "\n".join(part for part in parts if part), fields.need_text("output"), origin)


def _matches(record: dict[str, Any]) -> bool:
    return _has(record, *QUERY) and _has(record, *RESPONSE)


def _convert(record: dict[str, Any], options: FormatOptions, origin: Origin) -> dict[str, Any]:
    fields = Fields(record, origin)
    name, query = fields.need(*QUERY)
    response, given = fields.need(*RESPONSE)
    answer = text(given, origin, response)
    # a reward compares with it
    solution = {"solution": given} if response == "solution" else {}
    query = query if isinstance(query, list | dict) else text(query, origin, name)
    return {**_conversation(fields, query, answer, origin, name), **solution}


def _conversation(fields: Fields, query: Any, answer: str, origin: Origin, name: str = "query") -> dict[str, Any]:
    messages = fields.take_system()
    history = fields.take("history")
    for index, pair in enumerate(listed(history) or [] if history is not None else []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ExampleError(origin, f"history[{index}]", f"{shown(pair)} is not a pair", "Give [question, answer]")
        for role, words in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": text(words, origin, f"history[{index}]")})
    messages += prompt_messages(query, origin, name, "user")
    return {**fields.rest(), "messages": [*messages, {"role": "assistant", "content": answer}]}


ALPACA = Format("alpaca", "instruction and output, with or without input", _matches_alpaca, _convert_alpaca)
QUERY_RESPONSE = Format(
    "query_response", f"a question ({', '.join(QUERY)}) and an answer ({', '.join(RESPONSE)})", _matches, _convert
)

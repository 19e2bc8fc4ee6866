"""Calls of tools: their schemas, what a model writes, and the grammar that forces a call.

Two forms are read, whichever the model writes: Hermes' and Qwen2.5's JSON, and the tags of Qwen3-coder and MiMo, both
between `<tool_call>` and `</tool_call>`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jvlm.inference.grammar_text import WHITESPACE
from jvlm.server.errors import bad
from jvlm.server.reasoning import held_back

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_BYTES = 64 * 1024
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FUNCTION = re.compile(r"\s*<function=([^<>\n]{1,64})>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]{1,256})>(.*?)</parameter>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call as the model wrote it.

    Attributes:
      arguments: an object as JSON.
    """

    name: str
    arguments: str


def check_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return the tools of a request. Raises APIError for what is no function."""
    if len(json.dumps(list(tools))) > MOST_BYTES:
        raise bad(f"the tools take more than {MOST_BYTES} bytes", "tools")
    for index, tool in enumerate(tools):
        where, function = f"tools[{index}].function", tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise bad("only tools of the type function are supported", f"tools[{index}]")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise bad("a name has 1 to 64 letters, digits, _ or -", f"{where}.name")
        if not isinstance(function.get("description") or "", str):
            raise bad("not text", f"{where}.description")
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise bad("not a JSON schema", f"{where}.parameters")
    return tuple({"type": "function", **tool} for tool in tools)


def chosen_tools(tools: Sequence[Mapping[str, Any]], choice: Any) -> list[Mapping[str, Any]] | None:
    """Return the tools of which one must be called; None where the model is free. Raises APIError."""
    if choice in (None, "auto", "none"):
        return None
    if not tools:
        raise bad("tool_choice needs tools", "tool_choice")
    if choice == "required":
        return list(tools)
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    found = [tool for tool in tools if tool["function"]["name"] == name]
    if not found:
        raise bad("tool_choice names no function of tools", "tool_choice")
    return found[:1]


def call_grammar(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return a grammar of llguidance for exactly one call of one of the tools."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": _closed(tool["function"].get("parameters")),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_pattern": WHITESPACE},
        }
        for tool in tools
    ]
    # a tag in angle brackets is a token of the vocabulary there, a quoted one is text: both read the same
    rules = "\n".join(f"call{index}: %json {json.dumps(schema)}" for index, schema in enumerate(calls))
    choices = " | ".join(f"call{index}" for index in range(len(calls)))
    return f'start: "{OPEN}\\n" call "\\n{CLOSE}"\ncall: {choices}\n{rules}\n'


def _closed(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the schema of arguments without others than it names, where it does not say whether there may be any."""
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    says = ("additionalProperties", "unevaluatedProperties", "patternProperties")
    if "properties" not in parameters or any(name in parameters for name in says):
        return dict(parameters)
    return {**parameters, "additionalProperties": False}


def parse_call(text: str, tools: Sequence[Mapping[str, Any]] = ()) -> Call | None:
    """Return the call between the tags; None if it is none."""
    function = _FUNCTION.fullmatch(text)
    if function:
        return _tagged(function[1].strip(), function[2], tools)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        arguments = {}
    return Call(value["name"], _dump(arguments)) if isinstance(arguments, dict) else None


def _tagged(name: str, body: str, tools: Sequence[Mapping[str, Any]]) -> Call | None:
    at, arguments = 0, {}
    schema = _properties(name, tools)
    while match := _PARAMETER.match(body, at):
        arguments[match[1].strip()] = _typed(match[2], schema.get(match[1].strip()))
        at = match.end()
    return Call(name, _dump(arguments)) if name and not body[at:].strip() else None


def _properties(name: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    for tool in tools:
        if tool["function"]["name"] == name:
            properties = (tool["function"].get("parameters") or {}).get("properties")
            return properties if isinstance(properties, Mapping) else {}
    return {}


def _typed(text: str, schema: Any) -> Any:
    """Return the value of a parameter: JSON where its schema wants no text and the value is JSON, else text."""
    text = text[1:] if text.startswith("\n") else text
    text = text[:-1] if text.endswith("\n") else text
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = {kind} if isinstance(kind, str) else set(kind) if isinstance(kind, list) else set()
    if isinstance(schema, Mapping) and not kinds and ("anyOf" in schema or "oneOf" in schema):
        kinds = {"object"}
    if not kinds or kinds == {"string"}:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) or ("string" in kinds and value is not None) else value


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class ToolCallReader:
    """Finds calls in text that arrives in pieces of any size. A call is given when it is whole; a broken one is text.

    Args:
      tools: by whose schemas parameters without types are read.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]):
        self.tools, self.calls, self.broken = tools, 0, 0
        self._held, self._inside, self._space = "", False, ""

    def feed(self, text: str) -> list[str | Call]:
        """Return the words and calls that a further piece completes."""
        self._held += text
        return [item for item in self._take() if item]

    def finish(self) -> list[str | Call]:
        """Return what was held back, at the end; a call without its closing tag counts if it is whole."""
        text, self._held = self._held, ""
        if self._inside:
            return [self._call(text, "")]
        text, self._space = self._space + text, ""
        text = text.rstrip() if self.calls else text
        return [text] if text else []

    def _take(self) -> Iterator[str | Call]:
        while True:
            before, found, behind = self._held.partition(CLOSE if self._inside else OPEN)
            if not found:
                if not self._inside:
                    kept = len(before) - held_back(before, OPEN)
                    self._held = before[kept:]
                    yield self._words(before[:kept])
                return
            self._held = behind
            yield self._call(before, CLOSE) if self._inside else self._words(before)
            self._inside = not self._inside

    def _words(self, text: str) -> str:
        """Text but for white space at its end, which goes if a call follows."""
        text = self._space + text
        words = text.rstrip()
        self._space = text[len(words) :]
        return words

    def _call(self, text: str, close: str) -> str | Call:
        space, self._space = self._space, ""
        call = parse_call(text, self.tools)
        if call is None:
            self.broken += 1
            return space + OPEN + text + close
        self.calls += 1
        return call

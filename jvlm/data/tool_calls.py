"""Tools in a row: their schemas, the calls in assistant turns, and whose answer a tool's turn is."""

from __future__ import annotations

import json
from typing import Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.values import shown, without_inner_nulls, without_nulls

# What a message may hold beside role and content, by the role that may hold it.
_ROLES = {"tool_calls": ("assistant",), "tool_call_id": ("tool",), "name": ("tool",)}
FIELDS = tuple(_ROLES)


def schemas(value: Any, origin: Origin) -> tuple[dict[str, Any], ...]:
    """Return the schemas of ``tools``: a list of objects, or that list as JSON.

    Raises:
      ExampleError: anything else.
    """
    fix = 'Give [{"type": "function", "function": {"name": ..., "parameters": {...}}}] or that as a string'
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ExampleError(origin, "tools", f"not JSON: {error}", fix) from error
        except RecursionError as error:
            raise ExampleError(origin, "tools", "JSON that is too deep", fix) from error
    if value is None or isinstance(value, str):
        return ()
    value = without_inner_nulls([value] if isinstance(value, dict) else value)
    if not isinstance(value, list | tuple):
        raise ExampleError(origin, "tools", f"a {type(value).__name__}, not a list", fix)
    for index, schema in enumerate(value):
        if not isinstance(schema, dict) or not schema:
            raise ExampleError(origin, f"tools[{index}]", f"{shown(schema)} is not the schema of a tool", fix)
    return tuple(value)


def with_content(message: Any) -> Any:
    """Return a message, its content empty where it is only calls of tools."""
    if isinstance(message, dict) and message.get("tool_calls") and message.get("content") is None:
        return {**message, "content": ""}
    return message


def fields(message: dict[str, Any], role: str, origin: Origin, field: str) -> tuple[tuple[str, Any], ...]:
    """Return what a chat template is given of a message beside role and content.

    Raises:
      ExampleError: a field of another role's message, or calls that are not such.
    """
    result = []
    message = without_nulls(message)
    for name, roles in _ROLES.items():
        value = message.get(name, "")
        if value in ("", []):
            continue
        where = f"{field}.{name}"
        if role not in roles:
            raise ExampleError(
                origin, where, f"in a message of the role {role}", f"It belongs to role {' or '.join(roles)}"
            )
        if name == "tool_calls":
            value = _calls(value, origin, where)
        elif not isinstance(value, str):
            raise ExampleError(origin, where, f"{shown(value)} is not text", "Give a string")
        result.append((name, value))
    return tuple(result)


def _calls(value: Any, origin: Origin, field: str) -> list[dict[str, Any]]:
    fix = 'Give [{"type": "function", "function": {"name": "...", "arguments": {...}}}]'
    if not isinstance(value, list | tuple):
        raise ExampleError(origin, field, f"a {type(value).__name__}, not a list", fix)
    calls = []
    for index, call in enumerate(value):
        call = without_nulls(call) if isinstance(call, dict) else {}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ExampleError(origin, f"{field}[{index}]", "no function with a name", fix)
        function = {**function, "arguments": _arguments(function.get("arguments"), origin, f"{field}[{index}]", fix)}
        calls.append({**call, "function": function} if "function" in call else function)
    return calls


def _arguments(value: Any, origin: Origin, field: str, fix: str) -> dict[str, Any]:
    """Return the arguments as an object, as templates write them; OpenAI's are JSON of it, whose nulls are meant."""
    given = value
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ExampleError(origin, f"{field}.arguments", f"not JSON: {error}", fix) from error
        except RecursionError as error:
            raise ExampleError(origin, f"{field}.arguments", "JSON that is too deep", fix) from error
    if value is None or value == "":
        return {}
    if not isinstance(value, dict):
        raise ExampleError(origin, f"{field}.arguments", f"{shown(value)} is not an object", fix)
    return value if isinstance(given, str) else without_inner_nulls(value)

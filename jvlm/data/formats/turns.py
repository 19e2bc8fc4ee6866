"""Turns of conversations: names of roles, and calls of tools that are turns of their own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Container
from typing import Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.values import is_null, shown

CALL = "tool_call"
LOSSES = ("loss", "loss_scale")
WEIGHT = "weight"
ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "bot", "assistant", "model"), "assistant"),
    **dict.fromkeys((CALL, "function_call"), CALL),
    **dict.fromkeys(("tool", "tool_response", "observation", "function"), "tool"),
}


def role_of(name: Any, origin: Origin, field: str) -> str:
    """Return the role that a name stands for. Raises ExampleError for an unknown one."""
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        near = difflib.get_close_matches(name, ROLES, n=1) if isinstance(name, str) else []
        fix = f"Did you mean {near[0]!r}?" if near else f"Use one of {', '.join(ROLES)}"
        raise ExampleError(origin, field, f"unknown role {shown(name)}", fix)
    return role


def with_weight(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose ``weight``, as OpenAI's and OpenHermes' have it, is that of the loss of an answer."""
    weight = message.get(WEIGHT)
    message = {key: value for key, value in message.items() if key != WEIGHT}
    if (
        is_null(weight)
        or message.get("role") not in ("assistant", CALL)
        or any(not is_null(message.get(key)) for key in LOSSES)
    ):
        return message
    return {**message, "loss_scale": weight}


def unused(items: list[Any], used: Container[str], field: str) -> dict[str, list[Any]]:
    """Return the values of keys of turns that a format does not use, by "FIELD[].KEY", to be carried along."""
    found: dict[str, list[Any]] = {}
    for item in items:
        for key, value in item.items() if isinstance(item, dict) else ():
            if key not in used and not is_null(value):
                found.setdefault(f"{field}[].{key}", []).append(value)
    return found


def with_calls(messages: list[Any], origin: Origin, field: str = "messages") -> list[Any]:
    """Return messages in which turns of the role "tool_call" are the calls of an assistant's turn.

    Calls that follow one another, or the text of an assistant's turn, are one turn: that is what chat templates write.
    """
    found: list[Any] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") != CALL:
            found.append(message)
            continue
        calls = _calls(message.get("content"), origin, f"{field}[{index}]")
        losses = {key: message[key] for key in LOSSES if not is_null(message.get(key))}
        last = found[-1] if found else None
        joins = (
            isinstance(last, dict)
            and last.get("role") == "assistant"
            and isinstance(last.get("tool_calls", []), list)
            and {key: last[key] for key in LOSSES if not is_null(last.get(key))} == losses
        )
        if joins:
            found[-1] = {**last, "tool_calls": [*last.get("tool_calls", []), *calls]}
        else:
            found.append({"role": "assistant", "content": "", "tool_calls": calls, **losses})
    return found


def _calls(value: Any, origin: Origin, field: str) -> list[dict[str, Any]]:
    fix = 'Write {"name": "...", "arguments": {...}}'
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ExampleError(origin, field, f"a call that is not JSON ({error})", fix) from error
        except RecursionError as error:
            raise ExampleError(origin, field, "a call that is nested too deep", fix) from error
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, dict):
            raise ExampleError(origin, field, f"{shown(call)} is not the call of a tool", fix)
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]

"""Conversations as messages: ms-swift's, LLaMA-Factory's and TRL's, with OpenAI's or Anthropic's content blocks."""

from __future__ import annotations

from typing import Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.formats import turns
from jvlm.data.formats.example_format import Format, FormatOptions
from jvlm.data.formats.fields import SYSTEM, Fields, listed, text_block
from jvlm.data.values import is_null, shown, without_nulls

REJECTED, RESPONSE = "rejected_messages", "rejected_response"
_TOOL_ROLES = (turns.CALL, "tool_response", "function_call", "observation")
_ANTHROPIC = ("tool_use", "tool_result", "image")


def _matches(record: dict[str, Any]) -> bool:
    return not is_null(record.get("messages"))


def _convert(record: dict[str, Any], options: FormatOptions, origin: Origin) -> dict[str, Any]:
    fields = Fields(record, origin)
    given = fields.take("messages")
    messages = listed(given)
    if messages is None:
        return record  # which `parse_example` explains
    messages, rejected, is_pair = _answers(fields, messages, origin)
    changed = convert_messages(messages, origin)
    has_system = any(isinstance(message, dict) and message.get("role") == "system" for message in messages)
    if fields.first(*SYSTEM) and not has_system:
        system = fields.take_system()
        changed = [*system, *changed]
        if rejected is not None:
            rejected = [*system, *rejected]
    if not is_pair and changed == messages and isinstance(given, list):
        return record
    return {**fields.rest(), "messages": changed, **({} if rejected is None else {REJECTED: rejected})}


def _answers(fields: Fields, messages: list[Any], origin: Origin) -> tuple[list[Any], list[Any] | None, bool]:
    """Return the messages, those with a rejected answer if it is given as messages, and whether anything was joined.

    ms-swift has the whole conversation, or all after the last user's turn; LLaMA-Factory one message of each kind.
    """
    if fields.first("chosen") and fields.first("rejected"):
        chosen, rejected = (prompt_messages(fields.take(n), origin, n, "assistant") for n in ("chosen", "rejected"))
        return [*messages, *chosen], [*convert_messages(messages, origin), *rejected], True
    if fields.first(REJECTED):
        given = listed(fields.take(REJECTED))
        if given is None:
            raise ExampleError(origin, REJECTED, "not a list of messages", 'Give [{"role": "user", "content": "..."}]')
        return messages, convert_messages(given, origin, REJECTED), True
    if fields.first(RESPONSE) and listed(fields.rest()[RESPONSE]) is not None:
        answer = convert_messages(listed(fields.take(RESPONSE)), origin, RESPONSE)
        asked = [n for n, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "user"]
        return messages, [*convert_messages(messages[: asked[-1] + 1 if asked else 0], origin), *answer], True
    return messages, None, False


def convert_messages(messages: list[Any], origin: Origin, field: str = "messages") -> list[Any]:
    """Return messages with the roles and blocks that `parse_example` takes. Raises ExampleError."""
    found: list[Any] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            found.append(message)
            continue
        role = message.get("role")
        if isinstance(role, str) and role in _TOOL_ROLES:
            message = {**message, "role": turns.ROLES[role]}
        if turns.WEIGHT in message:
            message = turns.with_weight(message)
        blocks = message.get("content")
        if isinstance(blocks, list | tuple) and any(_is_anthropic(block) for block in blocks):
            found += _of_blocks(message, list(blocks), origin, f"{field}[{index}]")
        else:
            found.append(message)
    return turns.with_calls(found, origin, field)


def _is_anthropic(block: Any) -> bool:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        return False
    return block["type"] in _ANTHROPIC and (block["type"] != "image" or not is_null(block.get("source")))


def _of_blocks(message: dict[str, Any], blocks: list[Any], origin: Origin, field: str) -> list[dict[str, Any]]:
    """Return an Anthropic message: results of tools are turns of their own, before the rest of the user's."""
    content, calls, results = [], [], []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"type": "function", "function": function})
        elif kind == "tool_result":
            results.append({"role": "tool", "content": _result(block.get("content"), origin, field)})
        else:
            content.append(_image(block, origin, field) if _is_anthropic(block) else block)
    rest = {**message, "content": content or ""}
    if calls:
        rest["tool_calls"] = calls
    return [*results, rest] if content or calls or not results else results


def _result(content: Any, origin: Origin, field: str) -> Any:
    if content is None:
        return ""
    if isinstance(content, list | tuple):
        return [_image(block, origin, field) if _is_anthropic(block) else block for block in content]
    return content


def _image(block: dict[str, Any], origin: Origin, field: str) -> dict[str, Any]:
    if block.get("type") != "image":
        raise ExampleError(origin, field, f"a block of type {shown(block.get('type'))} inside a result", "Use text")
    source = block["source"]
    given = without_nulls(source) if isinstance(source, dict) else {}
    if given.get("type") == "base64" and isinstance(given.get("data"), str):
        kind = given.get("media_type", "image")
        return {"type": "image", "image": f"data:{kind};base64,{given['data']}"}
    if isinstance(given.get("url"), str):
        return {"type": "image", "url": given["url"]}
    raise ExampleError(
        origin, field, f"an image with the source {shown(source)}", 'Give {"type": "base64", "data": "..."} or a url'
    )


def prompt_messages(value: Any, origin: Origin, field: str, role: str) -> list[Any]:
    """Return messages as they are, and a text as a message of a role. Raises ExampleError for anything else."""
    if isinstance(value, dict) and "role" in value:
        value = [value]
    found = listed(value)
    if found:
        return convert_messages(found, origin, field)
    if not isinstance(value, str):
        raise ExampleError(origin, field, f"{shown(value)} is neither text nor messages", "Give one of them")
    return [{"role": role, "content": value}]


def chat(blocks: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    """Return a user's turn of content blocks and an assistant's of text."""
    return [{"role": "user", "content": blocks}, {"role": "assistant", "content": [text_block(answer)]}]


MESSAGES = Format("messages", "messages", _matches, _convert)

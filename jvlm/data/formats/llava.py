"""LLaVA and ShareGPT: conversations of {from, value} or {human, assistant}."""

from __future__ import annotations

from typing import Any

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.formats import turns
from jvlm.data.formats.example_format import Format, FormatOptions
from jvlm.data.formats.fields import Fields, images_of, listed, need_list, text, videos_of
from jvlm.data.values import is_null, shown

_NAMES = ("conversations", "conversation")
_PAIR = ("system", "human", "user", "assistant")
_USED = ("from", "value", "role", "content", *_PAIR, *turns.LOSSES, turns.WEIGHT)
_IMAGE, _VIDEO = "<image>", "<video>"
_FIX = 'Give {"from": "human", "value": "..."}'


def _matches(record: dict[str, Any]) -> bool:
    return any(bool(listed(record.get(name))) for name in _NAMES)


def _convert(record: dict[str, Any], options: FormatOptions, origin: Origin) -> dict[str, Any]:
    fields = Fields(record, origin)
    name, value = fields.need(*_NAMES)
    given = need_list(value, origin, name)
    messages = _messages(given, origin, name)
    if videos_of(record) and not images_of(record):
        messages = _with_video_tags(messages, len(videos_of(record)))
    if not messages or messages[0]["role"] != "system":
        messages = [*fields.take_system(), *messages]
    found = {"messages": messages}
    if fields.first("chosen") and fields.first("rejected"):  # LLaMA-Factory's: one message each
        answers = {key: _messages([fields.take(key)], origin, key) for key in ("chosen", "rejected")}
        found = {
            "messages": [*messages, *answers["chosen"]],
            "rejected_messages": [*messages, *answers["rejected"]],
        }
    return {**fields.rest(), **turns.unused(given, _USED, name), **found}


def _with_video_tags(messages: list[dict[str, Any]], videos: int) -> list[dict[str, Any]]:
    """Return messages whose <image> tags stand for videos, as those of LLaVA-Video do."""
    texts = [message["content"] for message in messages if isinstance(message["content"], str)]
    if any(_VIDEO in words for words in texts) or sum(words.count(_IMAGE) for words in texts) != videos:
        return messages
    return [
        {**message, "content": message["content"].replace(_IMAGE, _VIDEO)}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]


def _messages(items: list[Any], origin: Origin, name: str) -> list[dict[str, Any]]:
    found = []
    for index, item in enumerate(items):
        field = f"{name}[{index}]"
        if not isinstance(item, dict):
            raise ExampleError(origin, field, f"{shown(item)} is not an object", _FIX)
        if not is_null(item.get("from")):
            found.append(_turn(turns.role_of(item["from"], origin, f"{field}.from"), item, "value", origin, field))
        elif not is_null(item.get("role")):
            found.append(_turn(turns.role_of(item["role"], origin, f"{field}.role"), item, "content", origin, field))
        else:
            pairs = [key for key in item if key in _PAIR and not is_null(item[key])]
            if not pairs:
                raise ExampleError(origin, field, f"neither from nor human in {shown(item)}", _FIX)
            found += [_turn(turns.ROLES[key], item, key, origin, field) for key in sorted(pairs, key=_PAIR.index)]
    return turns.with_calls(found, origin, name)


def _turn(role: str, item: dict[str, Any], key: str, origin: Origin, field: str) -> dict[str, Any]:
    value = item.get(key)
    if is_null(value):
        raise ExampleError(origin, f"{field}.{key}", "missing", _FIX)
    weights = {name: item[name] for name in (*turns.LOSSES, turns.WEIGHT) if not is_null(item.get(name))}
    # tags of images are part of the text, as in ms-swift's format; a call may be an object already
    content = value if role == turns.CALL else text(value, origin, f"{field}.{key}")
    return turns.with_weight({"role": role, "content": content, **weights})


LLAVA = Format("llava", "conversations, a list of {from, value} or {human, assistant}", _matches, _convert)

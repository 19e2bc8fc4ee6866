"""Media that no tag stands for: they go before the first user text, as ms-swift and LLaVA's trainers put them."""

from __future__ import annotations

from typing import Any

from jvlm.data.formats.fields import IMAGES, VIDEOS, images_of, videos_of
from jvlm.data.values import is_null

_IMAGE_BLOCKS = ("image", "image_url")
_REJECTED = "rejected_messages"
_MEDIA = (*IMAGES, *VIDEOS)


def with_tags(record: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return a record of the ms-swift format in which images and videos have tags, and how many were given one.

    Only where none has: with some tags missing nothing says which media they belong to. A rejected conversation beside
    the messages gets tags for the same media, unless it has its own.
    """
    rejected = record.get(_REJECTED)
    if isinstance(rejected, list) and not any(not is_null(record.get(f"rejected_{name}")) for name in _MEDIA):
        media = {name: record[name] for name in _MEDIA if not is_null(record.get(name))}
        record = {**record, _REJECTED: _tagged({"messages": rejected, **media})[0]["messages"]}
    return _tagged(record)


def _tagged(record: dict[str, Any]) -> tuple[dict[str, Any], int]:
    messages = record.get("messages")
    media = (("<image>", "image", len(images_of(record))), ("<video>", "video", len(videos_of(record))))
    lacking = [(tag, kind, count) for tag, kind, count in media if count and not _is_tagged(messages, tag, kind)]
    user = _first_user(messages)
    if not lacking or user is None:
        return record, 0
    content = messages[user]["content"]
    for tag, kind, count in reversed(lacking):
        content = tag * count + content if isinstance(content, str) else [*[{"type": kind}] * count, *content]
    changed = [*messages]
    changed[user] = {**messages[user], "content": content}
    return {**record, "messages": changed}, sum(count for *_, count in lacking)


def _is_tagged(messages: Any, tag: str, kind: str) -> bool:
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    for content in contents:
        if isinstance(content, str) and tag in content:
            return True
        for block in content if isinstance(content, list | tuple) else ():
            if not isinstance(block, dict):
                continue
            if block.get("type") in (_IMAGE_BLOCKS if kind == "image" else (kind,)):
                return True
    return False


def _first_user(messages: Any) -> int | None:
    if not isinstance(messages, list):
        return None
    for index, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            return index if isinstance(message.get("content"), str | list) else None
    return None

"""Answers and their rewards as JSON, as both sides of the service write and read them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jvlm.data.values import number
from jvlm.errors import UserError
from jvlm.rl.rewards.source import RewardItem
from jvlm.scoring.score import Score

MOST_ITEMS = 256  # of a request


class WireError(Exception):
    """An answer of a server that is not of the protocol; says how."""


def blob_name(content: bytes) -> str:
    """Return the name of a picture: "sha256:" and its hash."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def item_values(item: RewardItem) -> dict[str, Any]:
    """Return the JSON of an item. Pictures are named by their hash; their places in messages name no file.

    Raises:
      UserError: a message with a video.
    """
    return {
        "id": item.id,
        "task": item.task,
        "messages": [_message(message, item.id) for message in item.messages],
        "answer": item.answer,
        "truncated": item.truncated,
        "thinking_opened": item.thinking_opened,
        "gold": item.gold,
        "columns": dict(item.columns),
        "images": [blob_name(image) for image in item.images],
        "token_ids": list(item.token_ids),
    }


def _message(message: Mapping[str, Any], item: str) -> dict[str, Any]:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = [_part(part, item) for part in content]
    return {"role": message.get("role", ""), "content": content}


def _part(part: Mapping[str, Any], item: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": part.get("text") or ""}
    if kind not in ("image", "image_url"):
        raise UserError(f"item {item}, messages: a service of rewards takes text and images, not {kind!r}")
    return {"type": "image"}


def result_values(item: RewardItem, score: Score, milliseconds: float) -> dict[str, Any]:
    """Return the JSON of an item's reward."""
    try:
        parsed = json.loads(json.dumps(score.parsed, allow_nan=False, default=str))
    except (ValueError, TypeError):
        parsed = str(score.parsed)[:300]
    return {
        "id": item.id,
        "value": score.value,
        "reason": score.reason,
        "parsed": parsed,
        "ms": round(milliseconds, 3),
        "extra": {},
    }


def scores_of(body: bytes, identity: str, items: Sequence[RewardItem]) -> list[Score]:
    """Return the rewards of a server's answer.

    Raises:
      WireError: another request's answer, another number or order of items, a value that is not from 0 to 1 or null.
    """
    try:
        values = json.loads(body)
        results = values["results"]
        if values["id"] != identity or [one["id"] for one in results] != [item.id for item in items]:
            raise WireError("the results are not those of the items that were sent, in their order")
        return [_score(one) for one in results]
    except (ValueError, KeyError, TypeError) as error:
        raise WireError(f"the answer is not of the protocol: {type(error).__name__} {error}") from error


def _score(result: Mapping[str, Any]) -> Score:
    value, reason = result["value"], result["reason"]
    plain = number(value)
    if value is not None and (plain is None or not math.isfinite(plain) or not 0 <= plain <= 1):
        raise WireError(f"item {result['id']}: the value {value!r} is not a number from 0 to 1, or null")
    if not isinstance(reason, str):
        raise WireError(f"item {result['id']}: the reason {reason!r} is no text")
    return Score(None if plain is None else float(plain), reason, result.get("parsed"))

"""Documents for tests, block by block."""

from __future__ import annotations

from typing import Any

from tests.support import picture


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image(seed: int = 0, size: tuple[int, int] = (56, 56)) -> dict[str, Any]:
    return {"type": "image", "image": picture(*size, seed)}


def page(*blocks: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"document": list(blocks), **fields}

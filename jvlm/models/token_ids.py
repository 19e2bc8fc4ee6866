"""Token ids as configuration files give them: one, a list of them, or null."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jvlm.errors import UserError


def token_ids(value: Any, field: str) -> tuple[int, ...]:
    """Return the ids that a field holds.

    Raises:
      UserError: something else than an id, a list of ids or null.
    """
    ids = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int)]
    if wrong:
        raise UserError(f"{field} holds {wrong[0]!r}; it must be a token id, a list of token ids, or null")
    return tuple(ids)


def end_token_id(*configs: Mapping[str, Any], default: int | None = None) -> int | tuple[int, ...] | None:
    """Return ``eos_token_id`` of the first part of a config.json that sets it, as transformers resolves it."""
    value = first_set("eos_token_id", *configs, default=default)
    ids = token_ids(value, "eos_token_id")
    return ids if isinstance(value, list | tuple) else ids[0] if ids else None


def first_set(field: str, *configs: Mapping[str, Any], default: Any = None) -> Any:
    """Return the field of the first part of a config.json where it is there and not null."""
    return next((config[field] for config in configs if config.get(field) is not None), default)

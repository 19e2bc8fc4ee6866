"""The JSON of a body, within limits that are checked before anything large is built."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from jvlm.server.errors import APIError, bad, of_validation

T = TypeVar("T", bound=BaseModel)
_STRINGS = re.compile(rb'"(?:[^"\\]+|\\.)*+"', re.DOTALL)


def parse_json(body: bytes, *, depth: int, nodes: int) -> dict[str, Any]:
    """Return the object of a body.

    Raises:
      APIError: not UTF-8, not JSON, no object, deeper or with more values than allowed, or half a character in it.
    """
    if _count(body) > nodes and _count(_STRINGS.sub(b"", body)) > nodes:
        raise bad(f"the body has more than {nodes} values")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise bad("the body is not UTF-8") from error
    except RecursionError as error:
        raise bad(f"the body is nested deeper than {depth}") from error
    except ValueError as error:
        raise bad("the body is not valid JSON") from error
    if not isinstance(value, dict):
        raise bad("the body is not a JSON object")
    _check(value, depth, b"\\u" in body or b"\\U" in body)
    return value


def _count(body: bytes) -> int:
    return body.count(b",") + body.count(b"{") + body.count(b"[")


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _check(value: Any, depth: int, surrogates: bool) -> None:
    """Raise APIError for what is too deep, and for half a surrogate pair, which no tokenizer takes."""
    level = [value]
    for _ in range(depth):
        following = []
        for item in level:
            if isinstance(item, dict):
                following += item.values()
                if surrogates:
                    following += item.keys()
            elif isinstance(item, list):
                following += item
            elif surrogates and isinstance(item, str) and not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError as error:
                    raise bad("a text holds half of a surrogate pair, which is no character") from error
        if not following:
            return
        level = following
    if any(isinstance(item, dict | list) for item in level):
        raise bad(f"the body is nested deeper than {depth}")


def validated(kind: type[T], value: dict[str, Any]) -> T:
    """Return a request of a kind. Raises APIError naming the fields that are wrong, and those that are not done."""
    try:
        request = kind.model_validate(value)
    except ValidationError as error:
        raise of_validation(error.errors(include_url=False, include_context=False, include_input=False)) from None
    refused = getattr(request, "refused", list)()
    if refused:
        raise bad(f"{refused[0]} is not supported", refused[0])
    return request


def json_only(content_type: str | None) -> None:
    """Raise APIError for a body that is said to be something else than JSON."""
    kind = (content_type or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(415, "the body must be application/json")

"""Checks of configuration values, so that a wrong one is named when it is given and not met hours later."""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from jvlm.errors import UserError


def check_fields(config: Any, prefix: str, bounds: Mapping[str, str]) -> None:
    """Check the values of a dataclass against its annotations, and its numbers against their bounds.

    Numbers must be finite and of their type (``True`` is none), choices one of those listed, and a group of names must
    not be one text, which would be taken letter by letter.

    Args:
      prefix: of the fields in messages, "optimizer." for ``optimizer.max_grad_norm``.
      bounds: interval of each number as it is written, "[1, inf)" or "[0, 1)"; any finite number without one.

    Raises:
      UserError: naming the field, its value and what is allowed.
    """
    for name, (kinds, choices, optional) in _fields(type(config)).items():
        value = getattr(config, name)
        if value is None and optional:
            continue
        if isinstance(value, str) and value in choices:
            continue
        if choices and not kinds:
            raise UserError(f"{prefix}{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if kinds & {int, float}:
            _check_number(f"{prefix}{name}", value, kinds, choices, bounds.get(name, "(-inf, inf)"))
        elif tuple in kinds and isinstance(value, str):
            raise UserError(f"{prefix}{name} is a list, got the text {value!r}; write ({value!r},)")


def _check_number(name: str, value: Any, kinds: set[type], choices: tuple[str, ...], interval: str) -> None:
    wanted = "a number" if float in kinds else "a whole number"
    allowed = int | float if float in kinds else int
    if isinstance(value, bool) or not isinstance(value, allowed):
        others = "".join(f" or {choice!r}" for choice in choices)
        raise UserError(f"{name} must be {wanted}{others}, got {value!r}")
    low, high = (float(text) for text in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (math.isfinite(value) and above and below):  # NaN is neither above nor below
        raise UserError(f"{name} must be {_in_words(interval, low, high)}, got {value!r}")


def _in_words(interval: str, low: float, high: float) -> str:
    if interval[0] + interval[-1] == "[]":
        return f"from {low:g} to {high:g}"
    parts = []
    if low > -math.inf:
        parts.append(f"at least {low:g}" if interval[0] == "[" else f"more than {low:g}")
    if high < math.inf:
        parts.append(f"less than {high:g}")
    return " and ".join(parts) or "a finite number"


@functools.cache
def _fields(kind: type) -> dict[str, tuple[set[type], tuple[str, ...], bool]]:
    """(types, choices, whether None is allowed) of each field."""
    return {name: _parts(hint) for name, hint in typing.get_type_hints(kind).items()}


def _parts(hint: Any) -> tuple[set[type], tuple[str, ...], bool]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return set(), arguments, False
    if origin in (typing.Union, types.UnionType):
        members = [_parts(member) for member in arguments if member is not type(None)]
        kinds = set().union(*(m[0] for m in members))
        return kinds, tuple(c for m in members for c in m[1]), type(None) in arguments
    return {origin or hint}, (), False

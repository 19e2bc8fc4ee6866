"""Typed, frozen configuration trees to and from plain values (for JSON), and what differs between two of them."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from jvlm import families
from jvlm.errors import UserError
from jvlm.tags import Tagged

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """Return plain values; a configuration whose type is chosen carries its tag under "type".

    Raises:
      TypeError: a type without a tag, which no file can name.
    """
    if dataclasses.is_dataclass(config):
        values = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": _tag(config), **values} if isinstance(config, Tagged) else values
    if isinstance(config, Mapping):
        return {name: to_dict(value) for name, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(v) for v in config]
    return config


def _tag(config: Tagged) -> str:
    if config.tag is None:
        name = type(config).__name__
        raise TypeError(f'{name} has no tag: write class {name}(..., tag="...") to save it')
    return config.tag


def from_dict(kind: type[T], values: Any, path: str = "") -> T:
    """Return the configuration of plain values, the inverse of `to_dict`.

    Raises:
      UserError: an unknown field or tag (naming the nearest known one), a missing field, a value of the wrong type.
    """
    if isinstance(kind, type) and issubclass(kind, Tagged):
        if not isinstance(values, dict) or "type" not in values:
            raise UserError(f'{path.rstrip(".") or "configuration"}: {values!r} needs a "type"')
        values = dict(values)
        kind = _type(kind, values.pop("type"), path)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, values, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if values is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        chosen = [k for k in kinds if typing.get_origin(k) is typing.Literal and values in typing.get_args(k)]
        if not chosen and len(kinds) > 1:  # a single value or a list of them
            many = [k for k in kinds if typing.get_origin(k) is tuple]
            kinds = many if isinstance(values, list | tuple) else [k for k in kinds if k not in many]
        return from_dict((chosen or _fitting(kinds, values))[0], values, path)
    if origin is tuple and isinstance(values, list):
        kinds = [arguments[0]] * len(values) if arguments[-1] is Ellipsis else arguments
        return tuple(from_dict(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, values, strict=True)))
    if origin is Mapping and isinstance(values, dict):
        return {name: from_dict(arguments[1], value, f"{path}{name}.") for name, value in values.items()}
    if origin is typing.Literal:
        if values not in arguments:
            raise UserError(f"{path.rstrip('.')}: {values!r} is not one of {arguments}")
        return values
    if kind is float and isinstance(values, int) and not isinstance(values, bool):
        return float(values)
    if not isinstance(values, origin or kind):
        raise UserError(f"{path.rstrip('.')}: {values!r} is not of type {kind}")
    return values


def _fitting(kinds: list[type], values: Any) -> list[type]:
    """Order types so that the plain value's own, or those whose fields are named as the values are, come first."""
    if not isinstance(values, dict):
        return sorted(kinds, key=lambda kind: type(values) is not kind)
    return sorted(kinds, key=lambda kind: not set(values) <= set(getattr(kind, "__dataclass_fields__", ())))


def _type(kind: type[Tagged], tag: Any, path: str) -> type:
    """Return the type of a tag, which must be ``kind`` or derive from it."""
    from jvlm.models import registry  # imports jax, which readers of data do without

    registry.load_all()
    families.load_all(until=lambda: tag in kind.types)
    known = {name: subtype for name, subtype in kind.types.items() if issubclass(subtype, kind)}
    if tag not in known:
        near = difflib.get_close_matches(str(tag), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{path}type: {tag!r} is unknown; {hint}known: {', '.join(sorted(known))}")
    return known[tag]


def _dataclass(kind: type, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{path or 'configuration'}: {values!r} is not a group of fields")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise UserError(f"unknown field {path + name!r}; {hint}")
    missing = [path + f.name for f in dataclasses.fields(kind) if f.name not in values]
    if missing:
        raise UserError(f"missing field {', '.join(map(repr, missing))}")
    return kind(**{name: from_dict(hints[name], value, f"{path}{name}.") for name, value in values.items()})


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Lines "field: before -> after" for two plain values of the same shape."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif before != after:
        yield f"{path}: {before!r} -> {after!r}"

"""The words of an ms-swift command line, made into those of `jvlm.options.parse`."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from jvlm import options
from jvlm.errors import UserError
from jvlm.swift.arguments import TrainingArguments
from jvlm.swift.other_names import ALIASES, ENGINES, IGNORED, OTHER_VALUES, OWN_ENGINE, REFUSED, SERVER_ALIASES

T = TypeVar("T")
# What transformers' HfArgumentParser takes as a boolean.
_TRUE, _FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
_NUMBER = re.compile(r"-\.?\d")


@dataclasses.dataclass(frozen=True)
class Parsed(typing.Generic[T]):
    """The arguments of a command.

    Attributes:
      given: names of those that were typed.
      notes: a line for each that has no use in jvlm.
    """

    arguments: T
    given: frozenset[str]
    notes: tuple[str, ...]


def parse(kind: type[T], words: Sequence[str], program: str) -> Parsed[T]:
    """Return the arguments that words stand for: ``--name value ...`` or ``--name=value``, with dashes or underscores.

    A boolean takes true or false, or no value for true; a list takes all words up to the next name.

    Raises:
      UserError: an unknown name, with the nearest known; one that jvlm cannot honour, with the nearest thing; a value
        of the wrong type.
      SystemExit: help was asked for, and is printed.
    """
    hints = dict(_hints(kind))
    if set(words) & {"-h", "--help"}:
        options.parse(kind, ["--help"], program, boolean_values=True)
    found, notes = {}, []
    for typed, values in _grouped(words, program):
        name = typed.replace("-", "_")
        of_server = SERVER_ALIASES.get(name)
        name = of_server if of_server in hints else name if name in hints else ALIASES.get(name, name)
        if name in found:
            raise UserError(f"{program}: --{typed} is given twice; give it once")
        if name in hints:
            found[name] = _values(name, hints[name], values, program)
        elif name in IGNORED or name.startswith(ENGINES):
            notes.append(f"--{name} has no use here: {IGNORED.get(name, OWN_ENGINE)}")
        elif name in REFUSED:
            if not REFUSED[name].accepts(values):
                shown = " ".join((f"--{name}", *values))
                raise UserError(f"{program} cannot do {shown}: {REFUSED[name].instead}")
        else:
            spelled = (alias for alias, meant in ALIASES.items() if meant in hints)
            raise _unknown(typed, (*hints, *spelled), program)
    clean = [word for name, values in found.items() for word in (f"--{name}", *values)]
    return Parsed(options.parse(kind, clean, program, boolean_values=True), frozenset(found), tuple(notes))


def without(words: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the words of a command line but for some options, in whatever spelling, and their values."""
    kept: list[str] = []
    keeps = True
    for word in words:
        if word.startswith("-") and not _NUMBER.match(word) and word != "-":
            name = word.lstrip("-").partition("=")[0].replace("-", "_")
            keeps = name not in names and SERVER_ALIASES.get(name) not in names
        if keeps:
            kept.append(word)
    return kept


def _unknown(typed: str, known: Sequence[str], program: str) -> UserError:
    name = typed.replace("-", "_")
    of_training = dict(_hints(TrainingArguments))
    if ALIASES.get(name, name) in of_training:
        return UserError(f"{program} has no option --{typed}, which is one of jvlm sft; {program} --help lists them")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean --{near[0]}?" if near else f"{program} --help lists them"
    return UserError(f"{program} has no option --{typed}; {hint}")


def _grouped(words: Sequence[str], program: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return each name, without dashes, with the values that follow it."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("-") and not _NUMBER.match(word) and word != "-":
            name, equals, value = word.lstrip("-").partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise UserError(f"{program}: {word!r} is the value of no option; {program} --help lists them")
    return [(name, tuple(values)) for name, values in found]


def _hints(kind: type) -> list[tuple[str, Any]]:
    """Return (name, type) of every option, groups included."""
    hints = typing.get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        found += _hints(hint) if dataclasses.is_dataclass(hint) else [(field.name, hint)]
    return found


def _values(name: str, hint: Any, values: tuple[str, ...], program: str) -> list[str]:
    """Return the words of one option, checked. Raises UserError."""
    kinds = _members(hint)
    is_list = any(typing.get_origin(k) is tuple for k in kinds)
    members = [m for k in kinds if typing.get_origin(k) is tuple for m in _members(typing.get_args(k)[0])] or kinds
    optional = type(None) in kinds
    if bool in members and not values:
        return ["True"]
    if not is_list and len(values) != 1:
        what = "needs a value" if not values else f"takes one value, got {' '.join(map(repr, values))}"
        raise UserError(f"{program}: --{name} {what}")
    return [_value(name, members, optional, value, program) for value in values]


def _value(name: str, members: list[Any], optional: bool, value: str, program: str) -> str:
    if optional and value.lower() in ("none", "null"):
        return "None"
    choices = [c for m in members if typing.get_origin(m) is typing.Literal for c in typing.get_args(m)]
    if bool in members:
        if value.lower() not in _TRUE + _FALSE:
            raise UserError(f"{program}: --{name} is true or false, got {value!r}")
        return str(value.lower() in _TRUE)
    if choices and all(isinstance(choice, str) for choice in choices):
        value = value.lower()
    if choices and value not in map(str, choices):
        other = OTHER_VALUES.get(name, {}).get(value)
        wanted = other or f"it is one of {', '.join(map(str, choices))}"
        raise UserError(f"{program}: --{name} cannot be {value!r}: {wanted}")
    for kind, text in ((int, "a whole number"), (float, "a number")):
        if kind in members and str not in members:
            try:
                kind(value)
            except ValueError as error:
                raise UserError(f"{program}: --{name} is {text}, got {value!r}") from error
    return value


def _members(hint: Any) -> list[Any]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if is_union else [hint]

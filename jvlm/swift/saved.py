"""args.json, in which a run keeps the arguments it was given, as ms-swift does."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jvlm
from jvlm import config as config_tree
from jvlm.errors import UserError
from jvlm.swift.checkpoints import ARGUMENTS
from jvlm.training.side_files import read_json, write_json

T = TypeVar("T")
_SECRET = ("hub_token",)


def flat(arguments: Any) -> dict[str, Any]:
    """Return name -> value of arguments, groups included."""
    values = {}
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def filled(arguments: T, values: Mapping[str, Any]) -> T:
    """Return arguments with some values replaced, by name; names of other commands are left out."""
    hints = typing.get_type_hints(type(arguments))
    changed = {}
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = filled(value, values)
        elif field.name in values:
            changed[field.name] = config_tree.from_dict(hints[field.name], values[field.name], f"{field.name}.")
    return dataclasses.replace(arguments, **changed)


def write(folder: Path, command: str, arguments: Any, given: Collection[str]) -> None:
    """Write args.json. Tokens are not in it."""
    values = {name: value for name, value in flat(arguments).items() if name not in _SECRET}
    write_json(folder / ARGUMENTS, {"jvlm": jvlm.__version__, "command": command, "given": sorted(given), **values})


def read(folder: Path) -> dict[str, Any]:
    """Return the values of a checkpoint folder's args.json, or of its run's.

    Raises:
      UserError: there is none, or it is damaged.
    """
    for place in (folder, folder.parent):
        values = read_json(place / ARGUMENTS, "give the arguments themselves")
        if values is not None:
            return values
    raise UserError(f"{folder / ARGUMENTS} is not there: it is written by jvlm sft; give the arguments themselves")

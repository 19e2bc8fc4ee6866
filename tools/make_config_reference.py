"""Write docs/config.md, the reference of every field of an experiment, from the dataclasses and their docstrings.

python tools/make_config_reference.py
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import docstring_parser

import jvlm
from jvlm.training.config import Experiment

TARGET = Path(__file__).parents[1] / "docs/config.md"
HEAD = """# Configuration reference

Every field of an experiment. Do not edit this page: `python tools/make_config_reference.py` writes it from the code,
and a test checks that it is up to date.

Set a field in the `get_config()` of an experiment, or on the command line by its path, as in
`jvlm train mimo_vl/easy_vqa --optimizer.learning_rate 1e-5`. A list takes several words: `--data.train a.jsonl
b.jsonl`. A name that does not exist is refused with the nearest one that does. `jvlm train mimo_vl/easy_vqa --help`
shows the same help with the values of that config.
"""


def render() -> str:
    """Return the page."""
    # a base class knows its kinds (encoders, image processors, ...) once their modules are imported
    for package in ("models", "data", "families"):
        for module in pkgutil.walk_packages([f"{jvlm.__path__[0]}/{package}"], f"jvlm.{package}."):
            importlib.import_module(module.name)
    sections, done = [], set()
    queue: list[tuple[str, type]] = [("", Experiment)]
    while queue:
        path, kind = queue.pop(0)
        if kind not in done:
            done.add(kind)
            sections.append(_section(path, kind, queue))
    return "\n".join([HEAD, *sections]).rstrip() + "\n"


def _section(path: str, kind: type, nested: list[tuple[str, type]]) -> str:
    """Return the table of a dataclass; the dataclasses of its fields are added to ``nested``."""
    heading = f"## {path or 'experiment'} (`{kind.__name__}`)"
    lines = [heading, "", _summary(kind), "", "| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    hints, help_of = typing.get_type_hints(kind), field_help(kind)
    for field in dataclasses.fields(kind):
        full = f"{path}.{field.name}" if path else field.name
        kinds = list(_dataclasses_in(hints[field.name]))
        if not kinds and dataclasses.is_dataclass(field.default):
            kinds = [type(field.default)]  # of a type that others derive from: its options are those of the value
        for part in kinds:
            variants = _variants(part)
            nested += [(full, variant) for variant in variants]
        meaning = _cell(help_of.get(field.name, ""))
        lines.append(f"| `{full}` | {_cell(_type(hints[field.name]))} | {_cell(_default(field))} | {meaning} |")
    return "\n".join([*lines, ""])


def field_help(kind: type) -> dict[str, str]:
    """Return the help of each field of a dataclass, from its docstring and those of its bases."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        for entry in docstring_parser.parse(owner.__dict__.get("__doc__") or "").params:
            for name in entry.arg_name.split(","):
                found[name.strip()] = entry.description or ""
    return found


def _summary(kind: type) -> str:
    parsed = docstring_parser.parse(kind.__doc__ or "")
    texts = [text for text in (parsed.short_description, parsed.long_description) if text]
    return "\n\n".join(_cell(text) for text in texts)


def _dataclasses_in(hint: object) -> typing.Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _dataclasses_in(part)


def _variants(kind: type) -> list[type]:
    """Return a dataclass, or the dataclasses that take the place of a base without fields."""
    children = [child for child in kind.__subclasses__() if child.__module__.startswith("jvlm.")]
    below = [variant for child in sorted(children, key=lambda c: c.__name__) for variant in _variants(child)]
    return ([kind] if dataclasses.fields(kind) or not below else []) + below


def _type(hint: object) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments)
    if origin is typing.Literal:
        return ", ".join(f"`{value!r}`".replace("'", '"') for value in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}" if arguments[-1] is Ellipsis else ", ".join(map(_type, arguments))
    if origin is Mapping:
        return f"{_type(arguments[1])} by name"
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint))


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(value):
        return f"`{type(value).__name__}`"
    if value in ((), {}):
        return "empty"
    return f"`{value!r}`".replace("'", '"')


def _cell(text: str) -> str:
    # reST's double backticks are Markdown's single ones
    return re.sub(r"``([^`]*)``", r"`\1`", " ".join(text.split())).replace("|", "\\|")


def main() -> None:
    TARGET.write_text(render())
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()

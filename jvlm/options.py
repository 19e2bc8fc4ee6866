"""Command-line options from dataclasses: every field is an option, named by its path, with the field's docs as help."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import AvoidSubcommands, FlagConversionOff, FlagCreatePairsOff, PositionalMetavarFromFieldName

from jvlm.errors import UserError

C = TypeVar("C")
T = TypeVar("T")

# Annotation of a field that holds a dataclass: its options have no prefix.
FLAT = tyro.conf.arg(name="")
_OF_TYRO = ("help", "tyro_print_completion", "tyro_write_completion")
_KINDS = {int: "a whole number", float: "a number", bool: "True or False", type(None): "None", str: "text"}
# options under the names that they had before, which scripts may still use
_RENAMED = {"on_bad_row": "on_bad_example", "rows_per_shard": "examples_per_shard"}


def parse(
    kind: type[T], words: Sequence[str], program: str, default: T | None = None, *, boolean_values: bool = False
) -> T:
    """Return a dataclass made from command-line words; ``--help`` prints its options and exits.

    Booleans are flags ("--verbose"), or, with ``boolean_values``, take True or False.

    Args:
      program: what help and error messages call the command.
      default: an instance to start from; without it, fields that have no default must be given.

    Raises:
      UserError: an option that does not exist, naming the nearest that does; a word that is no option's value; a value
        that its option cannot take, naming those it can; an option that is lacking.
    """
    words = _renamed(words)
    _check_names(words, list(option_names(kind, default)), program)
    value, rest = _parse(kind, words, program, default, boolean_values=boolean_values)
    if rest:
        raise UserError(f"{program}: {rest[0]!r} is the value of no option; {program} --help lists them")
    return value


def parse_some(kind: type[T], words: Sequence[str], program: str) -> tuple[T, list[str]]:
    """Return a dataclass made from the words that are its options, and the other words, ``--help`` among them.

    Every field needs a default. Raises UserError for a value that its option cannot take.
    """
    return _parse(kind, words, program, None, add_help=False)


def override(default: T, words: Sequence[str], program: str) -> T:
    """Return a configuration with the fields of ``--field.path value ...`` replaced. Booleans take True or False.

    Raises: see `parse`.
    """
    _, changed = parse_with(_NoOptions(), default, words, program)
    return changed


def parse_with(command: C, config: T, words: Sequence[str], program: str) -> tuple[C, T]:
    """Return a command and a configuration, with the options of both, in any order.

    Args:
      command: its fields are options first of all: of the configuration's fields of the same names none are.
      config: a frozen dataclass; its fields are changed by path, and its booleans take True or False.
      words, program: see `parse`.

    Raises: see `parse`.
    """
    taken = {field.name for field in dataclasses.fields(command)}
    hints = typing.get_type_hints(type(config), include_extras=True)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    # a group of fields has names of its own
    fields = [(n, hints[n], v) for n, v in values.items() if n not in taken or dataclasses.is_dataclass(v)]
    view = dataclasses.make_dataclass(type(config).__name__, fields, frozen=True)
    view.__doc__ = type(config).__doc__
    both = dataclasses.make_dataclass(
        type(command).__name__,
        [
            ("command", Annotated[type(command), FLAT], command),
            ("config", Annotated[view, FLAT, FlagConversionOff], view()),
        ],
        frozen=True,
    )
    both.__doc__ = (type(command).__doc__ or type(config).__doc__ or "").partition("Attributes:")[0]
    parsed = parse(both, words, program, both())
    changed = {name: getattr(parsed.config, name) for name, _, _ in fields}
    return parsed.command, dataclasses.replace(config, **changed)


def option_names(kind: type, default: Any = None, prefix: str = "") -> Iterator[str]:
    """Yield the options of a dataclass, "optimizer.learning_rate", as `parse` takes them after two dashes."""
    return (name for name, _ in _options(kind, default, prefix))


def _options(kind: type, default: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, type) of each option of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        value = getattr(default, field.name, field.default)
        if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        flat = FLAT in getattr(hint, "__metadata__", ())
        path = prefix if flat else f"{prefix}{field.name}."
        bare = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(value):
            yield from _options(type(value), value, path)
        elif isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
            for index, item in enumerate(value):
                yield from _options(type(item), item, f"{path}{index}.")
        elif isinstance(value, Mapping) and value and all(map(dataclasses.is_dataclass, value.values())):
            for name, item in value.items():
                yield from _options(type(item), item, f"{path}{name}.")
        elif value is dataclasses.MISSING and dataclasses.is_dataclass(bare):
            yield from _options(bare, None, path)
        else:
            yield prefix + field.name, hint


def _parse(
    kind: type[T],
    words: Sequence[str],
    program: str,
    default: T | None,
    *,
    add_help: bool = True,
    boolean_values: bool = False,
) -> tuple[T, list[str]]:
    start = {} if default is None else {"default": default}
    booleans = (FlagConversionOff,) if boolean_values else ()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed = tyro.cli(
                kind,
                args=[{"true": "True", "false": "False"}.get(word, word) for word in words],
                prog=program,
                config=(AvoidSubcommands, FlagCreatePairsOff, PositionalMetavarFromFieldName, *booleans),
                use_underscores=True,
                return_unknown_args=True,
                add_help=add_help,
                **start,
            )
    except SystemExit as end:
        if not end.code:
            raise
        problem = _problem(printed.getvalue(), words, dict(_options(kind, default, "")))
        raise UserError(f"{program}: {problem}; {program} --help says more") from end
    sys.stderr.write(printed.getvalue())
    return parsed


def _problem(printed: str, words: Sequence[str], options: dict[str, Any]) -> str:
    """Return one line for what tyro prints, over several lines and in a frame, before it exits."""
    # the frame, which a terminal may have drawn in ASCII or in colours, says nothing
    plain = re.sub(r"\x1b\[[\d;]*m", "", printed)
    lines = [re.sub(r"^[│|]|[│|]$", "", line.strip()) for line in plain.splitlines()]
    text = " ".join(line.strip() for line in lines if re.search(r"\w", line))
    if "Missing from" in text:
        lacking = [match[1] for match in (re.match(r" {4,6}(--\S+|[A-Z]\S*)", line) for line in lines) if match]
        return f"give {', '.join(name if name.startswith('-') else name.lower() for name in lacking)}"
    named = (name for name in re.findall(r"--([\w.]+)", text) if name in options)
    name = next(named, None)
    if name is None:
        return text
    at, typed = next((i, w) for i, w in enumerate(words) if re.split("=", w[2:].replace("-", "_"))[0] == name)
    rest = words[at + 1 :]
    values = rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]
    return f"{' '.join([typed, *values])}: it takes {_allowed(options[name])}"


def _allowed(hint: Any) -> str:
    """Return what an option of a type takes, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _allowed(arguments[0])
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_allowed, arguments))
    if origin is tuple:
        return (
            f"any number of {_allowed(arguments[0])}"
            if Ellipsis in arguments
            else " and ".join(map(_allowed, arguments))
        )
    return _KINDS.get(hint, getattr(hint, "__name__", str(hint)))


def _renamed(words: Sequence[str]) -> list[str]:
    """Return the words with options of former names under their present ones."""
    pattern = re.compile(rf"--([\w.]*\.)?({'|'.join(_RENAMED)})(=.*)?", re.DOTALL)
    return [
        pattern.sub(lambda m: f"--{m[1] or ''}{_RENAMED[m[2]]}{m[3] or ''}", w) if pattern.fullmatch(w) else w
        for w in words
    ]


def _check_names(words: Sequence[str], known: Sequence[str], program: str) -> None:
    for word in words:
        option = re.match(r"--([^=]+)", word)
        name = option[1].replace("-", "_") if option else None
        if name is None or name in known or name in _OF_TYRO:
            continue
        last = name.rpartition(".")[2]
        same = [n for n in known if n.rpartition(".")[2] == last]
        same = sorted(same, key=lambda n: -difflib.SequenceMatcher(None, n, name).ratio())
        near = same or difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean --{near[0]}?" if near else f"{program} --help lists them"
        raise UserError(f"{program} has no option --{option[1]}; {hint}")


@dataclasses.dataclass(frozen=True)
class _NoOptions:
    pass


_NoOptions.__doc__ = None

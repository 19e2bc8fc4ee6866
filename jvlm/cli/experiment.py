"""Commands of an experiment: a config's name, options of the command, and fields of the experiment, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from jvlm import configs
from jvlm.errors import UserError
from jvlm.options import parse_some

T = TypeVar("T")
HELP = ("-h", "--help")


def split_words(options: type[T], words: Sequence[str], program: str) -> tuple[T, str | None, list[str]]:
    """Return the command's options, the config, and the words left over, which are fields of its experiment.

    The config is None where help is asked for without one; help is then among the words left over.

    Raises:
      UserError: no config, listing the shipped ones.
    """
    parsed, rest = parse_some(options, words, program)
    if rest and not rest[0].startswith("-"):
        return parsed, rest[0], rest[1:]
    if set(rest) & set(HELP):
        return parsed, None, rest
    raise UserError(
        f"give a config: {program} CONFIG ...\nIt is a Python file with get_config(), or one of\n\n{listing()}"
    )


def listing() -> str:
    """Return a line for each shipped config."""
    shipped = configs.shipped()
    width = max(map(len, shipped))
    return "\n".join(f"  {name:<{width}}  {summary}" for name, summary in shipped.items())

"""Fields of a configuration dataclass set by command-line options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def override(default: T, options: Sequence[str], program: str) -> T:
    """Return a dataclass with the fields of ``--field.path value ...`` replaced.

    Args:
      program: what help and error messages call the command.

    Raises:
      SystemExit: a wrong field or value, after naming the nearest right one.
    """
    import tyro

    return tyro.cli(
        type(default),
        args=[{"true": "True", "false": "False"}.get(option, option) for option in options],
        default=default,
        prog=program,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        use_underscores=True,
    )

"""Errors that the user can fix, as opposed to crashes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from os import PathLike


class UserError(Exception):
    """A mistake in the input: a file, a field, a value, a folder. The message names it and says what to do.

    The command line prints it as one message and exits with status 2; running the same command again never helps.
    Every other exception is a crash: a traceback and status 1, which a launcher may restart. This is no `ValueError`,
    so that a handler of other libraries' ValueErrors can neither hide it nor turn a bug into it.
    """


@contextlib.contextmanager
def file_errors(path: str | PathLike, action: str) -> Iterator[None]:
    """Raise a `UserError` that names ``path`` for an OSError inside, as "PATH cannot be ACTION (reason)".

    Wrap only what opens, reads or writes that one file, which the user has named.

    Args:
      action: "read" or "written".
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be {action} ({error.strerror or error})") from error

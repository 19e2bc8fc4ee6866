"""Files that requests may name: regular ones below one folder, reached without any symbolic link."""

from __future__ import annotations

import contextlib
import os
import stat
import urllib.parse
from pathlib import Path, PurePosixPath


class FileRefused(Exception):
    """A file that is not there, not allowed or not to be read; which of these is not told."""


def read_below(root: str | None, name: str, most_bytes: int) -> bytes:
    """Return the contents of a file that a path or a ``file:`` URL names, which must be below ``root``.

    Each folder on the way is opened by itself, and no symbolic link is followed: what was checked is what is read.

    Raises:
      FileRefused: whatever is wrong.
    """
    if root is None:
        raise FileRefused
    if name[:5].lower() == "file:":
        rest = name[5:]
        if not rest.startswith("///") and not rest.startswith("//localhost/"):
            raise FileRefused
        name = urllib.parse.unquote(rest.removeprefix("//localhost").removeprefix("//"))
    top = Path(root).resolve()
    path = PurePosixPath(name)
    if "\0" in name or ".." in path.parts:
        raise FileRefused
    try:
        parts = path.relative_to(top).parts if path.is_absolute() else path.parts
        if not parts:
            raise FileRefused
        return _read(top, parts, most_bytes)
    except (OSError, ValueError) as error:
        raise FileRefused from error


def _read(top: Path, parts: tuple[str, ...], most_bytes: int) -> bytes:
    with contextlib.ExitStack() as stack:
        folder = _opened(stack, str(top), os.O_RDONLY | os.O_DIRECTORY, None)
        for part in parts[:-1]:
            folder = _opened(stack, part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, folder)
        # a pipe must not make the opening wait
        file = _opened(stack, parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, folder)
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most_bytes:
            raise FileRefused
        with os.fdopen(os.dup(file), "rb") as stream:
            content = stream.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise FileRefused
        return content


def _opened(stack: contextlib.ExitStack, name: str, flags: int, folder: int | None) -> int:
    file = os.open(name, flags | os.O_CLOEXEC, dir_fd=folder)
    stack.callback(os.close, file)
    return file

"""JSON files that others wrote: read whole, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from etils import epath

from jvlm.errors import UserError

# What stands in place of a large file where a repository was cloned without them.
LFS_POINTER = "is a pointer of Git LFS, not the file itself: run git lfs pull in the folder, or download the file"


def is_lfs_pointer(beginning: bytes) -> bool:
    """Return whether a file that begins so is a pointer of Git LFS."""
    return beginning.startswith(b"version https://git-lfs.github.com/spec/")


def read_object(path: Path | epath.Path) -> dict[str, Any]:
    """Return the JSON object of a file; a byte order mark in front is skipped.

    Raises:
      UserError: the file is missing, cut short, not JSON, or holds something else than an object.
    """
    try:
        data = path.read_bytes()
        values = json.loads(data.decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; copy the whole folder again") from error
    except (OSError, RecursionError, ValueError) as error:
        if not isinstance(error, OSError) and is_lfs_pointer(data):
            raise UserError(f"{path} {LFS_POINTER}") from error
        raise UserError(
            f"{path} cannot be read as JSON ({error}); it may have been cut short: copy it again"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, not an object of named values; copy it again")
    return values


def read_object_if_there(path: Path | epath.Path) -> dict[str, Any]:
    """Return what `read_object` does; empty where there is no such file."""
    return read_object(path) if path.exists() else {}

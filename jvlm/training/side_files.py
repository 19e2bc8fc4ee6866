"""Small files of a run that a crash may cut short: written whole or not at all, lines read as far as they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jvlm.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its path and rename it: whoever reads it sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    os.replace(beside, path)


def write_json(path: Path, values: Any) -> None:
    """One JSON value, by `write_whole`."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path, fix: str) -> Any:
    """Return the JSON value of a file; None if there is no file. Raises UserError naming a damaged one, and the fix."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {fix}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, up to a line that was cut short."""
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file, by `write_whole`."""
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))

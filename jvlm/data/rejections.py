"""Rejected examples grouped by what is wrong with them, so that one fault in many examples is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from jvlm.data import stores
from jvlm.data.errors import Origin, Rejected
from jvlm.data.example_source import matching
from jvlm.errors import UserError, file_errors

_SHOWN_ORIGINS = 3
_KINDS = 1000
_SHOWN = 400


@dataclasses.dataclass
class Group:
    """Examples with one fault: how many, and the first of them."""

    first: Rejected
    count: int = 0
    origins: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the first example's message, and where the examples are."""
        example = self.first
        origin = Origin(example.file, example.number)
        message = f"{origin}, field {example.field!r}: {_short(example.reason)}. {example.fix}".rstrip()
        more = f" and {self.count - len(self.origins):,} more" if self.count > len(self.origins) else ""
        return [f"  {self.count:,} x {message}", f"      at {', '.join(self.origins)}{more}"]


class Rejections:
    """Counts rejected examples by fault, with one example and three origins of each fault, however many there are."""

    def __init__(self, rejected: Iterable[Rejected] = ()):
        self.groups: dict[tuple[str, ...], Group] = {}
        for example in rejected:
            self.add(example)

    def add(self, example: Rejected) -> None:
        """Count an example."""
        key = example.fault
        if key not in self.groups and len(self.groups) >= _KINDS:
            key = ("others", example.kind)
        group = self.groups.setdefault(key, Group(example))
        group.count += 1
        if len(group.origins) < _SHOWN_ORIGINS:
            group.origins.append(f"{example.file}:{example.number}")

    def count(self, kind: str | None = None) -> int:
        """Examples, of one kind or of all."""
        return sum(group.count for group in self.groups.values() if kind in (None, group.first.kind))

    def lines(self, most: int = 20) -> list[str]:
        """Two lines for each fault, the most frequent first."""
        groups = sorted(self.groups.values(), key=lambda group: -group.count)
        lines = [line for group in groups[:most] for line in group.lines()]
        if groups[most:]:
            lines.append(f"  {sum(group.count for group in groups[most:]):,} x {len(groups) - most} other faults")
        return lines


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@contextlib.contextmanager
def writing(output: str | None, files: Sequence[str], *, verbose: bool = False) -> Iterator[Callable[[Rejected], None]]:
    """Yield what to call with each rejected example: it prints it, and writes it to a JSONL that appears when all are.

    Raises:
      UserError: ``output`` is one of the files that are read, or holds something else.
    """
    target = stores.on_disk(output, "rejected examples are") if output else None
    if target is not None:
        _check_target(target, files)
    with _replacing(target) as file:

        def take(example: Rejected) -> None:
            if verbose:
                message = f"field {example.field!r}: {example.reason}. {example.fix}"
                print(f"{example.file}:{example.number}: {message}".rstrip())
            if file is not None:
                with file_errors(target, "written"):
                    file.write(json.dumps(dataclasses.asdict(example), ensure_ascii=True) + "\n")

        yield take
    if target is not None:
        print(f"every rejected example is in {target}")


def _check_target(target: Path, files: Sequence[str]) -> None:
    if target.is_dir():
        raise UserError(f"{target}: a folder. Give --output a file")
    if not target.exists():
        return
    for path in (path for pattern in files for path in matching(pattern)):
        if os.path.samefile(path, target):
            raise UserError(f"--output {target} is the data itself, {path}. Give another name")
    with file_errors(target, "read"), open(target, "rb") as file:
        first = file.readline()
    names = {field.name for field in dataclasses.fields(Rejected)}
    try:
        is_ours = not first or set(json.loads(first)) == names
    except (ValueError, TypeError):
        is_ours = False
    if not is_ours:
        raise UserError(
            f"--output {target} holds something else than rejected examples. Give another name, or remove it"
        )


@contextlib.contextmanager
def _replacing(target: Path | None) -> Iterator[TextIO | None]:
    """Yield a text file that takes its name once it is whole."""
    if target is None:
        yield None
        return
    with file_errors(target, "written"):
        target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with contextlib.ExitStack() as stack:
            with file_errors(target, "written"):
                file = stack.enter_context(open(part, "w", encoding="utf-8"))
            yield file
            with file_errors(target, "written"):
                file.flush()
                part.replace(target)
    finally:
        part.unlink(missing_ok=True)

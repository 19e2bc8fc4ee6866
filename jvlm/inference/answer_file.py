"""The output of a batch file: JSONL that only one run writes, that is proved to be ours before a byte of it changes.

answers.jsonl            each example with its answer, or its error, and the hash of the settings behind it
answers.jsonl.meta.json  those settings, for every hash
answers.jsonl.lock       while a run writes: its process and host
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import glob
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from jvlm import config as config_tree
from jvlm.data import stores
from jvlm.data.errors import ExampleError
from jvlm.data.example_source import ExampleSource, matching
from jvlm.errors import UserError, file_errors
from jvlm.inference.file_lock import locked

HASH = "settings_hash"
_ANSWER = ("response", "prompt_tokens", "response_tokens", "finish")
ADDED = frozenset((*_ANSWER, "error", HASH))
_ELSEWHERE = "Give another output, or move this one away"
_KIND = "jvlm batch file"
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Run:
    """Where lines come from: what decides an answer, and of which examples. The folder is told, not compared."""

    settings_hash: str
    settings: dict[str, Any]
    data_hash: str
    data_examples: int
    model_folder: str


@dataclasses.dataclass(frozen=True)
class Done:
    """Lines that an output has already: with an answer, and with an error."""

    answered: int = 0
    errors: int = 0

    @property
    def lines(self) -> int:
        return self.answered + self.errors


def check_paths(data: str | Path, output: str | Path) -> list[str]:
    """The data's files. Looks at names only, so that a mistake is told before a model is loaded.

    Raises:
      FileNotFoundError: no data.
      UserError: data of another kind; an output that is the data, or that is no file on this machine's disk.
    """
    data, output = str(data), str(output)
    if not data.endswith(".jsonl"):
        raise UserError(f"{data}: give a *.jsonl file, of which each answer's line is a copy")
    if stores.is_remote(output):
        raise UserError(f"{output}: answers are written to this machine's disk; copy them from there")
    files = matching(data)
    for file in files:
        if os.path.exists(output) and os.path.samefile(file, output):
            raise UserError(f"the output {output} and the data {file} are the same file. {_ELSEWHERE}")
    # a file may have a name with the characters of a glob
    if glob.has_magic(data) and not os.path.exists(data) and not stores.is_remote(data) and _matches(output, data):
        raise UserError(f"the output {output} would be part of the data {data}. Give another output")
    if os.path.isdir(output):
        raise UserError(f"the output {output} is a folder; give the name of a file")
    if os.path.lexists(output) and os.path.exists(output) and not stat.S_ISREG(os.stat(output).st_mode):
        raise UserError(f"the output {output} is not a regular file, so it could not be continued; give another")
    return files


def _matches(output: str, pattern: str) -> bool:
    """Whether a glob finds the output, once it is there."""
    forms = (os.path.abspath, os.path.realpath)
    return any(_parts_match(PurePath(form(output)).parts, PurePath(form(pattern)).parts) for form in forms)


def _parts_match(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    if not patterns or not parts:
        return not parts and all(pattern == "**" for pattern in patterns)
    if patterns[0] == "**":
        return _parts_match(parts, patterns[1:]) or _parts_match(parts[1:], patterns)
    return fnmatch.fnmatchcase(parts[0], patterns[0]) and _parts_match(parts[1:], patterns[1:])


class AnswerFile:
    """An output that is locked and open; see `opened`."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self._descriptor = path, descriptor
        self.meta = path.with_name(f"{path.name}.meta.json")

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path) -> Iterator[AnswerFile]:
        """The output, made if it is not there, and no other run's until the end.

        Raises:
          UserError: it cannot be written, or another run writes it.
        """
        with contextlib.ExitStack() as stack:
            with file_errors(path, "written"):
                path.parent.mkdir(parents=True, exist_ok=True)
            # a link to the output is the output
            path = Path(os.path.realpath(path))
            stack.enter_context(locked(path))
            with file_errors(path, "written"):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, descriptor)
            yield cls(path, descriptor)

    def resume(self, source: ExampleSource, data: str | Path, run: Run, *, accept_changes: bool = False) -> Done:
        """Prove that every line is ours, cut a half-written last one, and record the settings of the lines to come.

        Raises:
          UserError: a line that does not answer the example of its number; other settings or data than those of the
            lines that are there, unless ``accept_changes``. The output is as it was.
        """
        runs = self._runs()
        done, whole, hashes = self._prove(source, data, known=bool(runs))
        values = dataclasses.asdict(run) | {"first_line": done.lines + 1}
        runs = self._continued(runs, hashes, values, accept_changes) if hashes else [values]
        with file_errors(self.path, "written"):
            os.ftruncate(self._descriptor, whole)
            os.lseek(self._descriptor, 0, os.SEEK_END)
        with file_errors(self.meta, "written"):
            part = self.meta.with_name(f"{self.meta.name}.{os.getpid()}.partial")
            part.write_text(json.dumps({"kind": _KIND, "runs": runs}, indent=2) + "\n")
            part.replace(self.meta)
        return done

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Write lines. Raises UserError naming the file when the disk does not take them."""
        left = memoryview(b"".join(to_bytes(line) + b"\n" for line in lines))
        with file_errors(self.path, "written"):
            while left:
                left = left[os.write(self._descriptor, left) :]

    def _runs(self) -> list[dict[str, Any]]:
        """Settings that the file beside the output lists; empty without one."""
        if not self.meta.exists():
            return []
        try:
            values = json.loads(self.meta.read_bytes())
            names = {field.name for field in dataclasses.fields(Run)}
            ours = values["kind"] == _KIND and all(names <= set(run) for run in values["runs"])
        except OSError as error:
            raise UserError(f"{self.meta} cannot be read ({error.strerror})") from error
        except (ValueError, TypeError, KeyError, RecursionError):
            ours = False
        if not ours or not values["runs"]:
            raise UserError(
                f"{self.meta} is damaged, or was not written by jvlm generate. It should hold the settings of "
                f"{self.path.name}: move it away, or give another output"
            )
        return values["runs"]

    def _prove(self, source: ExampleSource, data: str | Path, *, known: bool) -> tuple[Done, int, dict[str, int]]:
        """(lines, their bytes, hash -> first line that has it). ``known``: settings of the output are recorded."""
        answered = errors = whole = 0
        hashes: dict[str, int] = {}
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    problem, written = _read_line(line, source, data, number)
                else:
                    problem, written = _check_tail(line, source, data, number, known or number > 1), None
                if problem:
                    raise UserError(f"{self.path}, line {number}, {problem}. {_ELSEWHERE}")
                if written is None:
                    break
                hashes.setdefault(written[HASH], number)
                answered, errors = answered + ("error" not in written), errors + ("error" in written)
                whole += len(line)
        return Done(answered, errors), whole, hashes

    def _continued(
        self, runs: list[dict[str, Any]], hashes: dict[str, int], run: dict[str, Any], accept: bool
    ) -> list[dict[str, Any]]:
        """The runs that the lines are of, with this one. Raises UserError if it may not go on."""
        listed = {known[HASH] for known in runs}
        unlisted = {value: line for value, line in hashes.items() if value not in listed and value != run[HASH]}
        if unlisted and not accept:
            other, line = next(iter(unlisted.items()))
            raise UserError(
                f"{self.path}, line {line}, was made with other settings (hash {other}, now {run[HASH]}), which "
                f"{self.meta.name} does not list. {_ELSEWHERE}, or go on with --accept_changes"
            )
        changes = _changes(runs[-1], run) if runs else []
        if changes and not accept:
            shown = [*changes[:_SHOWN], f"and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else changes
            raise UserError(
                f"{self.path} was begun with other settings: {'; '.join(shown)}. Give those, or another output, or "
                "go on with --accept_changes"
            )
        unknown = [run | {HASH: value, "first_line": line, "settings": None} for value, line in unlisted.items()]
        return [*unknown, *runs] if runs and not changes else [*runs, *unknown, run]


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Lines "name: before -> after"."""
    lines = list(config_tree.differences(before["settings"], after["settings"]))
    lines += config_tree.differences({"data": before["data_hash"]}, {"data": after["data_hash"]})
    if before["data_examples"] != after["data_examples"]:
        lines.append(f"examples: {before['data_examples']} -> {after['data_examples']}")
    if any(line.startswith("model.") for line in lines) and before["model_folder"] != after["model_folder"]:
        lines.append(f"model: {before['model_folder']} -> {after['model_folder']}")
    return lines


def _read_line(line: bytes, source: ExampleSource, data: str | Path, number: int) -> tuple[str | None, dict[str, Any]]:
    """(what is wrong with a line, its values)."""
    if number > len(source):
        return f"has no example among the {len(source)} of {data}", {}
    example = _example_name(source, data, number)
    try:
        written = json.loads(line)
    except (ValueError, RecursionError):
        return f"is not JSON, so it is not an answer to {example}", {}
    if not isinstance(written, dict) or not _same(written, source[number - 1][1]):
        return f"is not an answer to {example}", {}
    if not ("error" in written or all(key in written for key in _ANSWER)):
        return f"is {example} without an answer, so jvlm generate did not write it", {}
    if not isinstance(written.get(HASH), str):
        return f"answers {example}, but without a {HASH}, so it is not known with which settings", {}
    return None, written


def _example_name(source: ExampleSource, data: str | Path, number: int) -> str:
    """An example for a message: with its file and line where blank lines or several files make them others."""
    origin, _ = source[number - 1]
    plain = (origin.file, origin.number) == (str(data), number)
    return f"example {number} of {data}" + ("" if plain else f" ({origin.file}, line {origin.number})")


def _check_tail(tail: bytes, source: ExampleSource, data: str | Path, number: int, known: bool) -> str | None:
    """What is wrong with a last line that has no end. ``known``: the file is ours, as far as that line."""
    if number > len(source):
        return f"has no example among the {len(source)} of {data}"
    own = copied(source[number - 1][1])
    if known and any(_begins(tail, begun[:-1]) for begun in (to_bytes(own), json.dumps(own).encode())):
        return None
    return f"is not the beginning of an answer to {_example_name(source, data, number)}"


def _begins(tail: bytes, begun: bytes) -> bool:
    """Whether a cut line is one that begins so, and goes on with another field."""
    length = min(len(begun), len(tail))
    return tail[:length] == begun[:length] and tail[length : length + 1] in (b"", b",", b'"')


def _same(written: dict[str, Any], example: Any) -> bool:
    # as text: a NaN does not equal itself
    return to_bytes(copied(written)) == to_bytes(copied(example))


def copied(example: Any) -> dict[str, Any]:
    """What an output's line repeats of its example."""
    if isinstance(example, ExampleError) or not isinstance(example, dict):
        return {}
    return {key: value for key, value in example.items() if key not in ADDED}


def to_bytes(line: dict[str, Any]) -> bytes:
    """A line without its end; half surrogate pairs, which UTF-8 cannot hold, escaped as JSON allows."""
    try:
        return json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(line).encode()

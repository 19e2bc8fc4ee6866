"""What a run sampled and what it was worth, kept on disk: one compressed file a step, enough to judge all of it again.

A step's file appears under its name once it is whole, so a run that is killed leaves no half of one; a restart removes
those of steps that will be run again. ``zcat rollouts/step-00000001.jsonl.gz | jq`` reads it: a line for each group,
and a last one for the step.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jvlm.errors import UserError, file_errors
from jvlm.rl.records import GroupRecord
from jvlm.rl.rewards.source import RewardItem
from jvlm.rl.rewards.wire import blob_name

ROLLOUTS = "rollouts"  # in the folder of a run
_FILE = re.compile(r"step-(\d{8})\.jsonl\.gz")
_PART = ".part"


class StoredGroup(NamedTuple):
    """A group of answers with all that its rewards need.

    Attributes:
      step: that judged it, from 1.
      group: its answers.
      prompt: what was asked, without an answer and without images.
      images: names of the images, "sha256:" and a hash each.
      lost: columns of the prompt that are no JSON, and are not here.
    """

    step: int
    group: GroupRecord
    prompt: RewardItem
    images: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    def items(self, folder: Path | None = None) -> list[RewardItem]:
        """Return the answers as rewards are asked for them.

        Args:
          folder: of the files, whose images are read; None leaves images out.

        Raises:
          UserError: an image is gone or damaged.
        """
        images = () if folder is None else tuple(read_image(folder, name) for name in self.images)
        return [
            dataclasses.replace(
                self.prompt,
                id=f"step {self.step}, group {self.group.serial}, answer {number}",
                answer=answer.text,
                images=images,
                truncated=answer.truncated,
                token_ids=answer.tokens,
            )
            for number, answer in enumerate(self.group.answers)
        ]


class RolloutWriter:
    """Writes the groups of a run, step by step.

    Args:
      folder: ``rollouts`` of the run.
      last_step: steps that are behind; files of later ones are removed, as those steps will be run again.
    """

    def __init__(self, folder: Path, last_step: int = 0):
        self.folder = folder
        with file_errors(folder, "written"):
            (folder / "images").mkdir(parents=True, exist_ok=True)
            for part in [*folder.glob(f"*{_PART}"), *folder.glob(f"images/*{_PART}")]:
                part.unlink()
            for step in steps(folder):
                if step > last_step:
                    path_of(folder, step).unlink()
        self._step, self._last = 0, last_step
        self._file: gzip.GzipFile | None = None

    def append(self, step: int, group: GroupRecord, prompt: RewardItem, images: Sequence[bytes] = ()) -> None:
        """Add a group to the file of its step, which `finish_step` completes.

        Args:
          prompt: what was asked.
          images: contents of its image files; one that is there is not written again.

        Raises:
          ValueError: the step before is not finished.
          UserError: a gold that is no JSON; a file cannot be written.
        """
        if step <= self._last or (self._file is not None and step != self._step):
            raise ValueError(f"step {self._step or self._last} comes before step {step}: finish it, in order")
        names = [blob_name(image) for image in images]
        for name, image in zip(names, images, strict=True):
            self._write_image(name, image)
        columns = {name: value for name, value in prompt.columns.items() if _is_json(value)}
        values = {
            "id": prompt.id,
            "messages": [dict(message) for message in prompt.messages],
            "gold": prompt.gold,
            "columns": columns,
            "thinking_opened": prompt.thinking_opened,
        }
        head = {"step": step, "images": names, "lost": sorted(set(prompt.columns) - set(columns)), "prompt": values}
        if not _is_json(values):
            raise UserError(f"{prompt.id}: its gold or its messages are no JSON, and cannot be written down")
        self._write(step, f'{_dump(head)[:-1]},"group":{group.line()}}}')

    def finish_step(self, step: int, summary: Mapping[str, Any]) -> None:
        """End the file of a step, which may have no group.

        Args:
          summary: of the step, as JSON: its loss and what else a replay compares with.
        """
        if step <= self._last:
            raise ValueError(f"step {step} is finished already")
        self._write(step, _dump({"step": step, "summary": dict(summary)}))
        path = path_of(self.folder, step)
        with file_errors(path, "written"):
            self.close()
            os.replace(_part(path), path)
        self._last = step

    def close(self) -> None:
        """Leave a step that was not finished; its file has no name."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _write(self, step: int, line: str) -> None:
        path = path_of(self.folder, step)
        with file_errors(path, "written"):
            if self._file is None:
                # no time in the header: equal steps have equal files
                self._file = gzip.GzipFile(_part(path), "wb", 6, mtime=0)
                self._step = step
            self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")

    def _write_image(self, name: str, content: bytes) -> None:
        path = image_path(self.folder, name)
        if path.exists():
            return
        with file_errors(path, "written"):
            _part(path).write_bytes(content)
            os.replace(_part(path), path)


def _dump(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _part(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def path_of(folder: Path, step: int) -> Path:
    """Return the file of a step."""
    return folder / f"step-{step:08d}.jsonl.gz"


def image_path(folder: Path, name: str) -> Path:
    """Return the file of an image, from its name "sha256:..."."""
    return folder / "images" / name.removeprefix("sha256:")


def read_image(folder: Path, name: str) -> bytes:
    """Return the content of an image. Raises UserError for one that is gone or has another hash."""
    path = image_path(folder, name)
    with file_errors(path, "read"):
        content = path.read_bytes()
    if blob_name(content) != name:
        raise UserError(f"{path} is damaged: its content has another hash than its name")
    return content


def steps(folder: Path) -> list[int]:
    """Return the steps that have a file, in order."""
    found = (_FILE.fullmatch(path.name) for path in folder.glob("step-*.jsonl.gz"))
    return sorted(int(match[1]) for match in found if match)


def read_groups(folder: Path, only: Iterable[int] | None = None) -> Iterator[StoredGroup]:
    """Yield the groups of a run, in the order of steps.

    Args:
      folder: ``rollouts`` of the run.
      only: steps to read; None reads all.

    Raises:
      UserError: there are none, a step has no file, or a file is damaged, naming the line.
    """
    for step in _chosen(folder, only):
        for number, values in _lines(path_of(folder, step)):
            if "summary" not in values:
                yield _stored(values, path_of(folder, step), number)


def read_summary(folder: Path, step: int) -> Mapping[str, Any]:
    """Return what the step said of itself. Raises UserError as `read_groups` does."""
    for one in _chosen(folder, [step]):
        for _, values in _lines(path_of(folder, one)):
            if "summary" in values:
                return values["summary"]
    raise UserError(f"{path_of(folder, step)} is damaged: it has no last line")


def _chosen(folder: Path, only: Iterable[int] | None) -> list[int]:
    there = steps(folder)
    if not there:
        raise UserError(f"{folder} holds no rollouts: give the folder of a run of jvlm rl")
    chosen = there if only is None else list(only)
    if gone := sorted(set(chosen) - set(there)):
        raise UserError(f"{folder} has no step {gone[0]}; it has {len(there)}, from {there[0]} to {there[-1]}")
    return chosen


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with file_errors(path, "read"), gzip.open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, json.loads(line.decode("utf-8", "surrogatepass"))
    except (EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}, after line {number}, is damaged ({error})") from error


def _stored(values: dict[str, Any], path: Path, number: int) -> StoredGroup:
    try:
        group, prompt = GroupRecord.of_values(values["group"]), values["prompt"]
        messages = tuple(prompt.pop("messages"))
        item = RewardItem(task=group.task, answer="", messages=messages, **prompt)
        return StoredGroup(values["step"], group, item, tuple(values["images"]), tuple(values["lost"]))
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}, line {number} is not a group of this version of jvlm ({error})") from error

"""Files of benchmarks in the forms that people have: snapshots of the Hub, VLMEvalKit's TSV, authors' own JSON."""

from __future__ import annotations

import ast
import dataclasses
import functools
import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jvlm.data.content import Image, Video
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.readers.reader import Reader
from jvlm.data.readers.registry import open_file
from jvlm.errors import UserError, file_errors

Form = Literal["hub", "tsv", "json"]
_VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif", ".MP4")
_FRAMES = (".jpg", ".jpeg", ".png", ".webp")
_REFERENCE = 64  # characters below which an image of a TSV is the index of the row that holds it


@dataclasses.dataclass(frozen=True)
class Files:
    """Files that a task can be read from.

    Attributes:
      form: "hub" is a snapshot of a dataset on the Hugging Face Hub (Parquet, JSON, JSONL, CSV); "tsv" a table of
        VLMEvalKit, images as base64; "json" what the authors give out.
      pattern: glob of the files, in the folder of the dataset.
      repo: the dataset's name on the Hub, ORG/NAME.
      records: of a JSON object: under which key the list of records is; "*" for the values of the object itself.
      attach: of a JSON object: another list in it, of records that name one of the first by "image_id"; each of the
        first has its own of them as a field.
      media: folder, beside the files, of images and videos.
    """

    form: Form
    pattern: str
    repo: str = ""
    records: str = ""
    media: str = ""
    attach: str = ""

    def __str__(self) -> str:
        if self.form == "hub":
            return f"{self.repo}: {self.pattern}" + (f", media in {self.media}/" if self.media else "")
        return self.pattern + (f" with {self.media}/" if self.media else "")

    def find(self, data: Path, task: str) -> list[str]:
        """Return the files in a data folder, sorted; none where they are not there."""
        for folder in self._folders(data, task):
            found = sorted(glob.glob(str(folder / self.pattern)))
            if found:
                return found
        return []

    def _folders(self, data: Path, task: str) -> Iterator[Path]:
        if self.repo:
            owner, _, name = self.repo.partition("/")
            cached = f"datasets--{owner}--{name}"
            yield from (data / owner / name, data / name, data / f"{owner}__{name}")
            for root in (data, data / "hub"):
                yield from sorted((root / cached / "snapshots").glob("*"))
        yield from (data / task, data)


def hub(repo: str, pattern: str, *, media: str = "", records: str = "") -> Files:
    """Return files of a dataset on the Hub."""
    return Files("hub", pattern, repo, records, media)


def tsv(name: str, *, media: str = "") -> Files:
    """Return a table of VLMEvalKit, by its name there."""
    return Files("tsv", f"{name}.tsv", media=media)


def official(pattern: str, *, records: str = "", media: str = "", attach: str = "") -> Files:
    """Return files as the authors of a benchmark give them out."""
    return Files("json", pattern, records=records, media=media, attach=attach)


@dataclasses.dataclass(frozen=True)
class Row:
    """A record of a file, whose fields have other names in each form."""

    values: Mapping[str, Any]
    origin: Origin
    form: Form = "hub"
    media: str | None = None

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the first of the fields that holds something."""
        for name in names:
            value = self.values.get(name)
            if value is not None and not (isinstance(value, str | list | tuple) and len(value) == 0):
                return value
        return default

    def need(self, *names: str) -> Any:
        """Return the first of the fields that holds something. Raises ExampleError if none does."""
        value = self.get(*names)
        if value is None:
            known = ", ".join(sorted(map(str, self.values)))
            problem = f"none of {', '.join(names)} among its fields: {known}"
            raise ExampleError(self.origin, names[0], problem, "Give the files that jvlm evaluate --list names")
        return value

    def text(self, *names: str) -> str:
        """Return a field as text. Raises ExampleError if it is not there."""
        return str(self.need(*names)).strip()

    def list(self, *names: str) -> list[Any]:
        """Return a field that is a list, or the text of one ("['a', 'b']"); anything else is a list of itself."""
        return as_list(self.get(*names))

    def images(self, *names: str) -> tuple[Image, ...]:
        """Return the images of all of the fields that are there, in order."""
        sources = [source for name in names for source in self._sources(self.values.get(name))]
        return tuple(Image(source, index, folder=self.media) for index, source in enumerate(sources))

    def _sources(self, value: Any) -> list[Any]:
        if isinstance(value, str) and value[:1] == "[":
            value = as_list(value)
        if isinstance(value, list | tuple):
            return [source for part in value for source in self._sources(part)]
        return [] if value is None or value == "" else [value]

    def video(self, *names: str, suffix: str = "") -> Video:
        """Return the video of a field, in the media folder: a file, or a folder of frames in the order of their names.

        Args:
          suffix: of names without one, unless the media folder has the video in another form of file.

        Raises:
          ExampleError: the field is not there, or its folder holds no frames.
        """
        value = self.need(*names)
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, str):
            return Video(file=value, folder=self.media)
        folder = Path(self.media or ".") / value
        if folder.is_dir():
            frames = sorted(str(one) for one in folder.iterdir() if one.suffix.lower() in _FRAMES)
            if not frames:
                raise ExampleError(self.origin, names[0], f"{folder} holds no frames", "Unpack the videos there again")
            return Video(tuple(frames), folder=self.media)
        if suffix and Path(value).suffix.lower() not in _VIDEOS:
            there = (form for form in (suffix, *_VIDEOS) if folder.with_name(folder.name + form).is_file())
            value += next(there, suffix)
        return Video(file=value, folder=self.media)


def as_list(value: Any) -> list[Any]:
    """Return a list, the list that a text of Python or JSON stands for, or a list of what is none."""
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str) and value.strip()[:1] == "[":
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(found, list):
                return found
    return [value]


class Rows:
    """Random access to the records of a task's files.

    Raises:
      UserError: none of the task's files is in the data folder: names all that would do.
    """

    def __init__(self, files: Sequence[Files], data: Path, task: str):
        self.files, self.paths = _first(files, data, task)
        self._readers: list[Reader] = [_open(path, self.files) for path in self.paths]
        self._media = [self._media_of(path) for path in self.paths]
        self._starts = [0]
        for reader in self._readers:
            self._starts.append(self._starts[-1] + len(reader))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Row:
        number = next(n for n, start in enumerate(self._starts) if start > index) - 1
        reader, local = self._readers[number], index - self._starts[number]
        origin = Origin(reader.path, reader.number(local))
        record = reader.read(local, origin)
        if isinstance(record, ExampleError):
            raise record
        if not isinstance(record, Mapping):
            raise ExampleError(origin, "example", f"a {type(record).__name__}, not named values", "Copy the file again")
        if self.files.form == "tsv":
            record = {**record, **self._referred(record)}
        return Row(record, origin, self.files.form, self._media[number])

    def _media_of(self, path: str) -> str:
        """Return the folder of a file's media: beside it, or as many folders up as the pattern goes down."""
        folder = os.path.dirname(path)
        depth = self.files.pattern.count("/")
        up = Path(folder).parents[depth - 1] if depth else Path(folder)
        roots = [Path(folder) / self.files.media, up / self.files.media]
        return str(next((root for root in roots if self.files.media and root.is_dir()), up))

    def _referred(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the image of another row, where the row's own is that row's index."""
        image = record.get("image")
        if not isinstance(image, str) or len(image) > _REFERENCE or image not in self._by_index:
            return {}
        return {"image": self._readers[0].read(self._by_index[image], Origin(self.paths[0])).get("image")}

    @functools.cached_property
    def _by_index(self) -> dict[str, int]:
        reader = self._readers[0]
        return {str(reader.read(i, Origin(reader.path)).get("index")): i for i in range(len(reader))}


def _first(files: Sequence[Files], data: Path, task: str) -> tuple[Files, list[str]]:
    if not data.is_dir():
        raise UserError(f"--data {data} is no folder; give the one that holds the files of the tasks")
    for one in files:
        if paths := one.find(data, task):
            return one, paths
    wanted = "\n".join(f"  {one}" for one in files)
    raise UserError(f"task {task}: none of its files is in {data}. Any of these will do:\n{wanted}")


def _open(path: str, files: Files) -> Reader:
    if path.endswith(".txt"):
        return _Lines(path)
    return _Records(path, files.records, files.attach) if files.records else open_file(path)


class _Lines:
    """The lines of a text file, each a record with the field "text"; empty ones are left out."""

    def __init__(self, path: str):
        self.path = path
        with file_errors(path, "read"), open(path, encoding="utf-8-sig") as file:
            self._lines = [(number, line.strip()) for number, line in enumerate(file, 1) if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def number(self, index: int) -> int:
        return self._lines[index][0]

    def read(self, index: int, origin: Origin) -> Any:
        return {"text": self._lines[index][1]}


class _Records:
    """The records of a list in a JSON object, each with those of another list that name it."""

    def __init__(self, path: str, key: str, attach: str = ""):
        self.path = path
        with file_errors(path, "read"), open(path, encoding="utf-8-sig") as file:
            try:
                values = json.load(file)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} cannot be read as JSON ({error}); copy it again") from error
        if key == "*" and isinstance(values, Mapping):
            self._records = [
                {"key": name, **(one if isinstance(one, Mapping) else {"value": one})} for name, one in values.items()
            ]
        else:
            self._records = values.get(key) if isinstance(values, Mapping) else values
        if not isinstance(self._records, list):
            raise UserError(f"{path} holds no list of records under {key!r}; give the file as its authors publish it")
        if attach:
            own: dict[Any, list[Any]] = {}
            for one in values.get(attach) or ():
                own.setdefault(one.get("image_id"), []).append(one)
            self._records = [{**one, attach: own.get(one.get("id"), [])} for one in self._records]

    def __len__(self) -> int:
        return len(self._records)

    def number(self, index: int) -> int:
        return index + 1

    def read(self, index: int, origin: Origin) -> Any:
        return self._records[index]

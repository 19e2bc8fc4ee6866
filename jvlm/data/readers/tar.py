"""WebDataset tars, with Energon's description of them beside: one example for all members of one name.

Members are grouped by their name up to the first dot of its last part, as WebDataset does; ``000.json``, ``000.jpg``
and ``000.txt`` are one example. Media come from the tar alone: no path in it is ever looked for on the disk.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from jvlm.data.errors import ExampleError, Origin
from jvlm.data.readers import file_kinds
from jvlm.data.readers.reader import parse_json
from jvlm.data.values import shown
from jvlm.errors import UserError
from jvlm.units import GIB

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_VIDEOS = ("mp4", "mkv", "webm", "avi", "mov")
_TEXTS = ("txt", "text", "caption", "cls")
_MOST_BYTES = GIB  # of one member
_MARK_AT = 257  # of "ustar" in a header
# Energon's samples (megatron-energon, flavors): names of their fields as formats know them
_ENERGON = {"context": "query", "answers": "response"}
ENERGON_FOLDER = ".nv-meta"


class _Member(NamedTuple):
    name: str
    extension: str  # behind the first dot, lower case
    offset: int
    size: int


class Tar:
    """Examples of a tar file. The index is made once; members are read at their offsets.

    Raises:
      UserError: a damaged file; a member outside the tar's own folder, that is a link, sparse, or too large.
    """

    def __init__(self, path: str):
        file_kinds.check_file(path)
        self.path, self._file = path, None
        groups: dict[str, list[_Member]] = {}
        end = 0
        try:
            with tarfile.open(path, "r:") as tar:
                for info in tar:
                    end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if not info.isdir():
                        member = _checked(path, info)
                        groups.setdefault(_key(info.name), []).append(member)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: not a whole tar file ({error}). Copy or write it again") from error
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise UserError(f"{path}: cut short or damaged: no end of the tar at byte {end:,}. Copy it again")
        self._keys, self._groups = list(groups), list(groups.values())
        self._map = field_map(path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self._groups)

    def number(self, index: int) -> int:
        """Return the number of an example, from 1."""
        return index + 1

    def read(self, index: int, origin: Origin) -> Any:
        try:
            if self._map is not None:
                return self._mapped(index, origin)
            return self._record(index, origin)
        except ExampleError as error:
            return error

    def resolve(self, record: Any, index: int, origin: Origin) -> Any:
        """Return a converted record with the names of images replaced by members of the tar. Raises ExampleError."""
        return _resolved(record, lambda name: self._member_named(name, index), origin)

    def _record(self, index: int, origin: Origin) -> dict[str, Any]:
        members = self._groups[index]
        extensions = [member.extension for member in members]
        twice = next((name for name in extensions if extensions.count(name) > 1), None)
        if twice is not None:
            raise ExampleError(origin, twice, f"two members {self._keys[index]}.{twice}", "Keep one of them")
        record: dict[str, Any] = {}
        for member in members:
            kind = member.extension.rpartition(".")[2]
            if kind == "json":
                record = {**self._json(member, origin), **record}
            elif kind in _TEXTS:
                # a class is a number
                record["label" if kind == "cls" else member.extension] = self._text(member, origin)
        for kinds, one, many in ((_IMAGES, "image", "images"), (_VIDEOS, "video", "videos")):
            media = [member for member in members if member.extension.rpartition(".")[2] in kinds]
            if media and not {one, many} & record.keys():
                found = [self._file_of(member) for member in media]
                record.update({one: found[0]} if len(found) == 1 else {many: found})
        record.setdefault("id", self._keys[index])
        return record

    def _mapped(self, index: int, origin: Origin) -> dict[str, Any]:
        """Return the fields of Energon's ``field_map``: extensions of members, or keys inside their JSON."""
        members = {member.extension: member for member in self._groups[index]}
        record: dict[str, Any] = {"id": self._keys[index]}
        for field, source in self._map.items():
            extension, *keys = re.split(r"[\[\]]+", str(source).rstrip("]"))
            member = next((members[name] for name in extension.lower().split(";") if name in members), None)
            if member is None:
                raise ExampleError(origin, field, f"no member {self._keys[index]}.{extension}", "Correct dataset.yaml")
            kind = member.extension.rpartition(".")[2]
            if kind in (*_IMAGES, *_VIDEOS):
                value: Any = self._file_of(member)
            elif kind == "json":
                value = parse_json(self._bytes(member), origin, f"{member.name} must be JSON")
                if isinstance(value, ExampleError):
                    raise value
                for key in keys:
                    value = _inside(value, key, origin, field)
            else:
                value = self._text(member, origin)
            record[_ENERGON.get(field, field)] = value
        return record

    def _json(self, member: _Member, origin: Origin) -> dict[str, Any]:
        value = parse_json(self._bytes(member), origin, f"{member.name} must be one JSON object")
        if isinstance(value, ExampleError):
            raise value
        if not isinstance(value, dict):
            raise ExampleError(origin, member.extension, f"{shown(value)} is not an object", "Write one JSON object")
        return value

    def _text(self, member: _Member, origin: Origin) -> str:
        try:
            return self._bytes(member).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ExampleError(origin, member.extension, f"not UTF-8 ({error})", "Write it in UTF-8") from error

    def _file_of(self, member: _Member) -> dict[str, Any]:
        return {"bytes": self._bytes(member), "path": PurePosixPath(member.name).name}

    def _member_named(self, name: str, index: int) -> dict[str, Any] | None:
        """Return a member by its whole name, its last part, or its extension."""
        for member in self._groups[index]:
            if name.removeprefix("./") in (member.name, PurePosixPath(member.name).name, member.extension):
                return self._file_of(member)
        return None

    def _bytes(self, member: _Member) -> bytes:
        if self._file is None:
            self._file = open(self.path, "rb")  # noqa: SIM115  stays open in this process
        return os.pread(self._file.fileno(), member.size, member.offset)


def _key(name: str) -> str:
    folder, _, last = name.rpartition("/")
    stem = last.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem


def _checked(path: str, info: tarfile.TarInfo) -> _Member:
    name = info.name.removeprefix("./")
    parts = PurePosixPath(name).parts
    problem = None
    if name.startswith("/") or ".." in parts:
        problem = "a name outside the tar"
    elif not info.isreg():
        problem = "a link or a device"
    elif info.issparse():
        problem = "sparse"
    elif info.size > _MOST_BYTES:
        problem = f"{info.size / GIB:.1f} GiB, above {_MOST_BYTES / GIB:.0f} GiB"
    elif info.offset_data + info.size > os.path.getsize(path):
        problem = "cut short with the file"
    if problem is not None:
        raise UserError(f"{path}: its member {info.name[:200]!r} is {problem}. Write the tar again without it")
    return _Member(name, PurePosixPath(name).name.partition(".")[2].lower(), info.offset_data, info.size)


def _inside(value: Any, key: str, origin: Origin, field: str) -> Any:
    if isinstance(value, dict) and key in value:
        return value[key]
    if isinstance(value, list) and key.isdigit() and int(key) < len(value):
        return value[int(key)]
    raise ExampleError(origin, field, f"no {key!r} inside {shown(value)}", "Correct dataset.yaml")


_FIELDS = ("images", "image", "videos", "video", "rejected_images", "rejected_videos")
_MEDIA = (*_FIELDS, "image_url", "url", "path")


def _resolved(value: Any, member_of: Callable[[str], Any], origin: Origin, field: str = "") -> Any:
    """Return a record whose media are members of the tar. In messages and documents only blocks hold media.

    The ``url`` of a record itself is where an image came from, as img2dataset writes it.
    """
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return value
        found = {}
        for key, inner in value.items():
            if key in (_MEDIA if field else _FIELDS):
                found[key] = _source(inner, member_of, origin, key)
            elif key in ("messages", "rejected_messages", "document", "content") and isinstance(inner, list):
                found[key] = [_resolved(item, member_of, origin, key) for item in inner]
            else:
                found[key] = inner
        return found
    return value


def _source(value: Any, member_of: Callable[[str], Any], origin: Origin, field: str) -> Any:
    if isinstance(value, list | tuple):
        return [_source(item, member_of, origin, field) for item in value]
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return value
        return {key: _source(value[key], member_of, origin, field) if key in _MEDIA else value[key] for key in value}
    if not isinstance(value, str) or value[:5].lower() == "data:":
        return value
    found = member_of(value)
    if found is None:
        raise ExampleError(
            origin, field, f"{value[:200]!r} is not in the tar", "Media of a tar's examples are members of the tar"
        )
    return found


def field_map(path: str) -> Mapping[str, str] | None:
    """Return the fields that Energon's dataset.yaml beside a tar gives; None where there is none."""
    file = Path(path).parent / ENERGON_FOLDER / "dataset.yaml"
    values = read_yaml(file) if file.is_file() else {}
    found = values.get("field_map")
    return found if isinstance(found, dict) and found else None


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the values of a YAML file. Raises UserError if it has none."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as YAML ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: {json.dumps(str(values))[:100]} where names and values are wanted")
    return values

"""Safetensors folders: lazy reading through the library, and streaming writing, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jvlm import json_files
from jvlm.errors import UserError
from jvlm.weights import vocabulary
from jvlm.weights.table import WeightError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_OTHERS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPES = {code: np.dtype(name) for name, code in _NAMES.items()}
_CODES = {"int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3"}  # of quantised ones


class Tensors:
    """The tensors of a folder, by name; opens each file once and reads nothing until asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, safe_open] = {}
        self._where: dict[str, str] = {}
        self._grown: dict[str, int] = {}
        self._fused: dict[str, tuple[str, int, int]] = {}
        with contextlib.ExitStack() as stack:
            files, listed = _files(folder)
            for file in files:
                try:
                    handle = stack.enter_context(safe_open(folder / file, framework="numpy"))
                except (SafetensorError, OSError) as error:
                    raise WeightError(_unreadable(folder / file, error)) from error
                self._files[file] = handle
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    if name in self._where:
                        raise WeightError(f"{name} is in both {self._where[name]} and {file}")
                    self._where[name] = file
            self._stack = stack.pop_all()
        _check_index(folder / INDEX, listed, self._where)

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        return list(self._where)

    def split(self, fused: Mapping[str, tuple[str, ...]]) -> None:
        """Give the parts of fused tensors in their place; see `jvlm.families.HFFormat.fused`."""
        for raw in list(self._where):
            for whole, parts in fused.items():
                if raw.endswith(f".{whole}"):
                    file = self._where.pop(raw)
                    for number, part in enumerate(parts):
                        name = raw.removesuffix(whole) + part
                        self._where[name] = file
                        self._fused[name] = (raw, number, len(parts))

    def grow(self, name: str, stored: int, rows: int) -> None:
        """Let a table of ``stored`` rows be read with so many, the new ones their mean; one of others stays."""
        if self.shape(name)[0] == stored < rows:
            self._grown[name] = rows

    def shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._slice(name).get_shape())
        if name in self._fused:
            return (*shape[:-1], shape[-1] // self._fused[name][2])
        return (self._grown[name], *shape[1:]) if name in self._grown else shape

    def dtypes(self, names: Iterable[str]) -> dict[str, np.dtype]:
        """Name -> dtype. Raises WeightError listing every tensor of a dtype that is not read (quantised ones)."""
        codes = {name: self._slice(name).get_dtype() for name in names}
        unknown = [f"{name} is stored as {code}" for name, code in codes.items() if code not in _DTYPES]
        if unknown:
            raise WeightError(
                f"{self.folder}: {len(unknown)} tensors of a dtype that is not supported "
                f"({', '.join(_DTYPES)} are):\n  " + "\n  ".join(unknown)
            )
        return {name: _DTYPES[code] for name, code in codes.items()}

    def read(self, name: str) -> np.ndarray:
        if name in self._fused:
            _, number, _ = self._fused[name]
            width = self.shape(name)[-1]
            whole = self._slice(name)
            return np.ascontiguousarray(whole[..., number * width : (number + 1) * width])
        value = self._files[self._where[name]].get_tensor(name)
        return vocabulary.with_rows(value, self._grown[name]) if name in self._grown else value

    def bytes_of(self, name: str) -> np.ndarray:
        """Return a tensor of one byte a value as uint8: of dtypes that numpy has no name for."""
        with open(self.folder / self._where[name], "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(size))[name]
            begin, end = entry["data_offsets"]
            file.seek(8 + size + begin)
            return np.frombuffer(file.read(end - begin), np.uint8).reshape(entry["shape"])

    def _slice(self, name: str):
        raw, *_ = self._fused.get(name, (name,))
        return self._files[self._where[name]].get_slice(raw)


def _files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return files to read, and where the index says each tensor is. A single file comes first, as in transformers."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        if index.is_file():
            print(f"{folder}: {SINGLE} is read, not the files that {INDEX} lists beside it", file=sys.stderr)
        return [SINGLE], {}
    if index.is_file():
        listed = json_files.read_object(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()) or not listed:
            raise WeightError(f"{index} has no weight_map of tensor names to files; copy it again")
        files = sorted(set(listed.values()))
        lacking = [f for f in files if not (folder / f).is_file()]
        if lacking:
            raise WeightError(f"{index} names files that are not there: {', '.join(lacking)}; copy them again")
        return files, listed
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if not files:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in _OTHERS)
        hint = f"; {others[0]} is not read: save it with transformers, which writes safetensors" if others else ""
        raise WeightError(f"no *.safetensors in {folder}{hint}")
    _check_shards(folder, files)
    return files, {}


def _check_shards(folder: Path, files: list[str]) -> None:
    """Whether all shards are there that the names of some speak of. Raises WeightError naming those that are not."""
    for file in files:
        match = _SHARD.fullmatch(file)
        if match is None:
            continue
        count, width = int(match[3]), len(match[2])
        lacking = [f"{match[1]}-{n:0{width}d}-of-{match[3]}.safetensors" for n in range(1, count + 1)]
        lacking = [name for name in lacking if name not in files]
        if lacking:
            shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
            raise WeightError(f"{folder} lacks {len(lacking)} of {count} shards: {shown}; copy them too")


def _unreadable(path: Path, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            pointer = json_files.is_lfs_pointer(file.read(64))
    except OSError:
        pointer = False
    if pointer:
        return f"{path} {json_files.LFS_POINTER}"
    return f"{path} is not a readable safetensors file ({error}); copy it again"


def _check_index(index: Path, listed: dict[str, str], where: dict[str, str]) -> None:
    wrong = [
        f"{name}: index says {file}, found in {where.get(name)}"
        for name, file in listed.items()
        if where.get(name) != file
    ]
    if wrong:
        raise WeightError(f"{index} is wrong about {len(wrong)} tensors:\n  " + "\n  ".join(wrong))


def dtype_of(name: str) -> np.dtype:
    """Return the dtype of a name. Raises UserError listing the names that can be written."""
    if name not in _NAMES:
        raise UserError(f"unknown dtype {name!r}; known: {', '.join(_NAMES)}")
    return np.dtype(name)


# name, dtype, shape, and what gives the values
Writable = tuple[str, np.dtype, tuple[int, ...], Callable[[], np.ndarray]]


def joined(tensors: Iterable[Writable], fused: Mapping[str, tuple[str, ...]]) -> list[Writable]:
    """Return tensors for `write` with those that a checkpoint stores side by side as one, where the first one stood."""
    wholes = {part: whole for whole, parts in fused.items() for part in parts}
    result: dict[str, list[Writable]] = {}
    for tensor in tensors:
        part = next((p for p in wholes if tensor[0].endswith(f".{p}")), None)
        name = tensor[0] if part is None else tensor[0].removesuffix(part) + wholes[part]
        result.setdefault(name, []).append(tensor)
    return [_one(name, parts) for name, parts in result.items()]


def _one(name: str, parts: list[Writable]) -> Writable:
    if len(parts) == 1:
        return parts[0]
    _, dtype, (*shape, _), _ = parts[0]
    reads = [read for *_, read in parts]
    width = sum(part_shape[-1] for _, _, part_shape, _ in parts)
    return name, dtype, (*shape, width), lambda: np.concatenate([read() for read in reads], axis=-1)


def write(
    folder: Path,
    tensors: Iterable[Writable],
    max_shard_bytes: int = 5 * 10**9,
    single_name: str = SINGLE,
) -> set[str]:
    """Write tensors in shards with an index, reading one at a time. Returns the names of the files.

    The files take their names when all of them are whole: what was there before is not changed by a failure.

    Args:
      tensors: (name, dtype, shape, read) for each; ``read()`` is called once, when its turn comes, and what it gives
        is cast to the dtype.
      max_shard_bytes: start a new file above this size.
      single_name: of the file, where one takes all tensors.

    Raises:
      WeightError: values that their tensor's dtype cannot hold, naming all tensors that have some.
    """
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    shards: list[list] = [[]]
    space = max_shard_bytes
    for tensor in tensors:
        size = tensor[1].itemsize * int(np.prod(tensor[2], dtype=np.int64))
        if shards[-1] and size > space:
            shards.append([])
            space = max_shard_bytes
        shards[-1].append(tensor)
        space -= size
    single = len(shards) == 1
    weight_map, total, too_large, partials = {}, 0, [], {}
    try:
        for number, shard in enumerate(shards, 1):
            file = single_name if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            partials[file] = folder / f"{file}.partial"
            total += _write_file(partials[file], shard, too_large)
            weight_map.update({name: file for name, *_ in shard})
        if too_large:
            raise WeightError(
                f"{folder} is not written: {len(too_large)} tensors hold values that their dtype cannot:\n  "
                + "\n  ".join(too_large)
                + "\nWrite them as bfloat16 or float32"
            )
        for file, partial in partials.items():
            os.replace(partial, folder / file)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    if single:
        return {file}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return {INDEX, *weight_map.values()}


def _write_file(path: Path, shard: list, too_large: list[str]) -> int:
    """Write one file; tensors with values too large for their dtype are added to the list. Returns bytes of tensors."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, _ in shard:
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {
            "dtype": (_NAMES | _CODES)[dtype.name],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape, read in shard:
            given = read()
            if given.shape != tuple(shape):
                raise WeightError(f"{name}: announced {shape}, got {given.shape}")
            with np.errstate(over="ignore"):
                value = np.ascontiguousarray(given, dtype)
            if value.dtype != given.dtype and (np.isinf(value) & np.isfinite(given)).any():
                most = np.abs(given[np.isfinite(given)].astype(np.float64)).max()
                limit = float(ml_dtypes.finfo(dtype).max)
                too_large.append(f"{name} holds {most:g}, and {dtype.name} ends at {limit:g}")
            file.write(value.view(np.uint8).data if value.size else b"")
    return offset

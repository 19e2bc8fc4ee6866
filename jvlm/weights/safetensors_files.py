"""Safetensors folders: lazy reading through the library, and streaming writing, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from jvlm.weights.table import WeightError

INDEX = "model.safetensors.index.json"
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPES = {code: np.dtype(name) for name, code in _NAMES.items()}


class Tensors:
    """The tensors of a folder, by name; opens each file once and reads nothing until asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, safe_open] = {}
        self._where: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            for file in _files(folder):
                try:
                    handle = stack.enter_context(safe_open(folder / file, framework="numpy"))
                except (SafetensorError, OSError) as error:
                    raise WeightError(f"{folder / file} is not a readable safetensors file ({error})") from error
                self._files[file] = handle
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    if name in self._where:
                        raise WeightError(f"{name} is in both {self._where[name]} and {file}")
                    self._where[name] = file
            self._stack = stack.pop_all()
        _check_index(folder, self._where)

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

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
        return self._files[self._where[name]].get_tensor(name)

    def _slice(self, name: str):
        return self._files[self._where[name]].get_slice(name)


def _files(folder: Path) -> list[str]:
    index = folder / INDEX
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        lacking = [f for f in files if not (folder / f).is_file()]
        if lacking:
            raise WeightError(f"{index} names files that are not there: {', '.join(lacking)}")
        return files
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if not files:
        raise WeightError(f"no *.safetensors in {folder}")
    return files


def _check_index(folder: Path, where: dict[str, str]) -> None:
    index = folder / INDEX
    if not index.is_file():
        return
    listed = json.loads(index.read_text())["weight_map"]
    wrong = [
        f"{name}: index says {file}, found in {where.get(name)}"
        for name, file in listed.items()
        if where.get(name) != file
    ]
    if wrong:
        raise WeightError(f"{index} is wrong about {len(wrong)} tensors:\n  " + "\n  ".join(wrong))


def write(
    folder: Path,
    tensors: Iterable[tuple[str, np.dtype, tuple[int, ...], Callable[[], np.ndarray]]],
    max_shard_bytes: int = 5 * 10**9,
) -> set[str]:
    """Write tensors in shards with an index, reading one at a time. Returns the names of the files.

    Args:
      tensors: (name, dtype, shape, read) for each; ``read()`` is called once, when its turn comes.
    """
    shards: list[list] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        size = tensor[1].itemsize * int(np.prod(tensor[2], dtype=np.int64))
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    single = len(shards) == 1
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_file(folder / file, shard)
        weight_map.update({name: file for name, *_ in shard})
    if single:
        return {file}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return {INDEX, *weight_map.values()}


def _write_file(path: Path, shard: list) -> int:
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, _ in shard:
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape, read in shard:
            value = np.ascontiguousarray(read())
            if value.dtype != dtype or value.shape != tuple(shape):
                raise WeightError(f"{name}: announced {dtype} {shape}, got {value.dtype} {value.shape}")
            file.write(value.view(np.uint8).data if value.size else b"")
    os.replace(partial, path)
    return offset

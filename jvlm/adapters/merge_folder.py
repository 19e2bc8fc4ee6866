"""A base's folder and an adapter to the folder of the merged model, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jvlm import json_files
from jvlm.adapters import folders, merge, peft_modules
from jvlm.adapters.weights import AdapterWeights, Target
from jvlm.errors import UserError
from jvlm.models.vlm import VLMConfig
from jvlm.weights import convert, safetensors_files, table
from jvlm.weights.convert import DType, Source
from jvlm.weights.table import Entry, WeightError
from jvlm.weights.vocabulary import EMBEDDING, HEAD


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What merging did.

    Attributes:
      changed: names of the tensors that differ from the base's.
      unchanged: names of tensors that the adapter adds to, and that are the base's still: what it adds is zero, or less
        than their dtype resolves.
      untied: whether the head, which was the embedding, is a matrix of its own now.
    """

    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    untied: bool


def merge_folder(
    base: str | Path,
    adapter: str | Path | AdapterWeights,
    target: str | Path,
    *,
    dtype: DType = "keep",
    layout: str = "released",
    max_shard_bytes: int = 5 * 10**9,
    force: bool = False,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> MergeReport:
    """Write the model of a base with an adapter added to it, as a Hugging Face folder.

    Sums are float64 and float32; each tensor is rounded once, to the dtype that it is stored in. The folder takes its
    name when all of it is written and every changed tensor was read back as it was meant.

    Args:
      base: a Hugging Face folder or a jvlm run; the model that the adapter was trained beside, not quantised.
      adapter: a PEFT folder, a run that trained adapters, or weights.
      target: a folder that does not exist.
      dtype: of every tensor; "keep" leaves each as the base has it.
      layout: tensor names, "released" or "transformers".
      max_shard_bytes: start a new file above this size.
      force: replace a model that is in the target already.
      on_tensor: called with name, number (from 1) and count as each tensor is written.

    Raises:
      UserError: the target exists; an adapter that changes nothing; an option that is unknown.
      WeightError: base and adapter do not fit each other, or what was written is not read back.
    """
    base, target = Path(base), Path(target)
    if dtype not in convert.DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; known: {', '.join(convert.DTYPES)}")
    _check_target(base, target, force)
    opened = convert.open_source(base)
    partial = target.with_name(f".{target.name}.partial")
    try:
        layouts = table.hf_format(opened.config).layouts
        if layout not in layouts:
            raise UserError(f"unknown layout {layout!r}; known: {', '.join(layouts)}")
        tensors = _MergedSource(opened, adapter, None if dtype == "keep" else np.dtype(dtype), layouts[layout])
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        written = safetensors_files.joined(tensors.tensors(on_tensor), tensors.fused)
        safetensors_files.write(partial, written, max_shard_bytes)
        tensors.check(partial)
        opened.write_sidecars(partial, None if dtype == "keep" else dtype)
        if tensors.untied:
            _untie(partial / "config.json")
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        opened.close()
        shutil.rmtree(partial, ignore_errors=True)
    return MergeReport(tuple(tensors.changed), tuple(tensors.unchanged), tensors.untied)


def _check_target(base: Path, target: Path, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise UserError(f"{target} exists: give a new folder, or force to replace the model in it")
    if not (target / "config.json").is_file():
        raise UserError(f"{target} holds no model, and only a model is replaced: give a new folder")
    inside = base.resolve()
    if inside == target.resolve() or target.resolve() in inside.parents:
        raise UserError(f"{target} holds the base {base}: give a new folder")


class _MergedSource:
    """The merged tensors, in the order of the weight table, with a checksum of each that the adapter has a part in."""

    def __init__(
        self, source: Source, adapter: str | Path | AdapterWeights, dtype: np.dtype | None, rename: Callable[[str], str]
    ):
        self.source, self.dtype, self.rename = source, dtype, rename
        self.fused = table.hf_format(source.config).fused
        self._base = {(entry.path, entry.layer): entry for entry in source.entries}
        if not isinstance(adapter, AdapterWeights):
            adapter = folders.read(adapter, source.config, self._parameter)
        config: VLMConfig = merge.merged_config(adapter, source.config)
        self.untied = config is not source.config
        self.entries = peft_modules.entries(config)
        self.merged = merge.Merged(adapter, self._read_base)
        merge.check_targets(adapter, {entry.path for entry in self.entries})
        self.changed: list[str] = []
        self.unchanged: list[str] = []
        self._checksums: dict[str, int] = {}

    def tensors(self, on_tensor: Callable[[str, int, int], None] | None):
        """Return what `safetensors_files.write` takes."""
        result = []
        for number, entry in enumerate(self.entries, 1):
            wanted = self.dtype or self.source.dtype(self._base_entry(entry.path, entry.layer))
            read = self._reader(entry, wanted, number, on_tensor)
            result.append((self.rename(entry.name), wanted, entry.shape, read))
        return result

    def _reader(self, entry: Entry, dtype: np.dtype, number: int, on_tensor) -> Callable[[], np.ndarray]:
        name = self.rename(entry.name)

        def read() -> np.ndarray:
            if on_tensor is not None:
                on_tensor(name, number, len(self.entries))
            if not self.merged.changes(entry.path, entry.layer):
                return self._stored(entry)
            value = entry.to_checkpoint(self.merged(entry.path, entry.layer))
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(value, dtype)
                if np.dtype(dtype) == np.float16 and not np.isfinite(stored).all():
                    return value  # the writer names what float16 cannot hold
                del value
                before = _checksum(self._stored(entry).astype(dtype, copy=False))
            self._checksums[name] = _checksum(stored)
            (self.unchanged if before == self._checksums[name] else self.changed).append(name)
            return stored

        return read

    def check(self, folder: Path) -> None:
        """Read back what changed.

        Raises:
          WeightError: naming tensors that are not as they were written.
          UserError: nothing changed.
        """
        if not self.changed:
            raise UserError(
                f"the adapter changes none of its {len(self.unchanged)} tensors: it was not trained, or it adds less "
                "than their dtype resolves; nothing is written"
            )
        with safetensors_files.Tensors(folder) as tensors:
            tensors.split(self.fused)
            wrong = [name for name, checksum in self._checksums.items() if _checksum(tensors.read(name)) != checksum]
        if wrong:
            raise WeightError(f"{folder}: {len(wrong)} tensors were not read back as written: {', '.join(wrong)}")

    def _base_entry(self, path: str, layer: int | None) -> Entry:
        """Return the base's tensor; the embedding's for a head that the base does not have."""
        return self._base[path, layer] if (path, layer) in self._base else self._base[EMBEDDING, None]

    def _stored(self, entry: Entry) -> np.ndarray:
        return self.source.read(self._base_entry(entry.path, entry.layer))

    def _read_base(self, path: str, layer: int | None) -> np.ndarray:
        entry = self._base_entry(path, layer)
        value = entry.to_param(self.source.read(entry))
        return value.T if path == HEAD and entry.path == EMBEDDING else value

    def _parameter(self, target: Target) -> np.ndarray:
        return self._read_base(target.path, target.index[0] if target.index else None)


def _checksum(value: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8))


def _untie(path: Path) -> None:
    """Say in a config.json that the head is a matrix of its own, at the root and in every part that speaks of it."""
    values = json_files.read_object(path)
    values["tie_word_embeddings"] = False
    for part in values.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")

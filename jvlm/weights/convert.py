"""Checkpoints to Hugging Face folders, one tensor in memory at a time.

The source is a Hugging Face folder or a jvlm run. Nothing here builds a model: names and shapes come from the weight
table, so a checkpoint of any size converts on a machine that holds its largest tensor twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np

from jvlm.models import vlm
from jvlm.models.layers import Numerics
from jvlm.models.vlm import VLMConfig
from jvlm.weights import chat_templates, checkpoint, run_folder, safetensors_files, table, tokenizer_files
from jvlm.weights.table import Entry, WeightError

DType = Literal["keep", "float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = ("keep", "float32", "bfloat16", "float16")

# What holds weights in a snapshot; every other file goes along.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".partial")


class Source(Protocol):
    """Where tensors come from: all of them checked against the table before the first is read."""

    config: VLMConfig
    entries: list[Entry]

    def dtype(self, entry: Entry) -> np.dtype:
        """How the tensor is stored."""
        ...

    def read(self, entry: Entry) -> np.ndarray:
        """The tensor in the checkpoint's layout. Calls come in the order of ``entries``."""
        ...

    def write_sidecars(self, target: Path, dtype: str | None) -> None:
        """Every other file of the folder; ``dtype`` is the new one of all tensors, or None."""
        ...

    def close(self) -> None: ...


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: str = "released",
    dtype: DType = "keep",
    max_shard_bytes: int = 5 * 10**9,
    step: int | None = None,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder, reading and writing one tensor at a time.

    Args:
      source: a Hugging Face folder, or a jvlm run.
      target: a folder that does not exist or is empty. config.json is written last: without it nothing loads.
      layout: tensor names, "released" (as published checkpoints) or "transformers" (as >= 4.52 in memory).
      dtype: of every tensor; "keep" leaves each as it is stored.
      max_shard_bytes: start a new file above this size.
      step: which checkpoint of a run; None is the latest.
      on_tensor: called with name, number (from 1) and count as each tensor is written.

    Raises:
      FileNotFoundError: no such source. FileExistsError: the target is not empty.
      WeightError: wrong, missing or extra tensors, all of them listed, before anything is written; or a value that
        float16 cannot hold.
    """
    source, target = Path(source), Path(target)
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder; give a new one")
    opened = _open(source, step)
    try:
        layouts = table.architecture_of(opened.config).layouts
        if layout not in layouts:
            raise ValueError(f"unknown layout {layout!r}; known: {', '.join(layouts)}")
        target.mkdir(parents=True, exist_ok=True)
        tensors = []
        for number, entry in enumerate(opened.entries, 1):
            name = layouts[layout](entry.name)
            wanted = opened.dtype(entry) if dtype == "keep" else np.dtype(dtype)
            notify = None if on_tensor is None else (lambda n=name, i=number: on_tensor(n, i, len(opened.entries)))
            tensors.append((name, wanted, entry.shape, _reader(opened, entry, wanted, notify)))
        safetensors_files.write(target, tensors, max_shard_bytes)
        opened.write_sidecars(target, None if dtype == "keep" else dtype)
    finally:
        opened.close()


def _reader(source: Source, entry: Entry, dtype: np.dtype, notify: Callable[[], None] | None):
    def read() -> np.ndarray:
        if notify is not None:
            notify()
        value = source.read(entry)
        if value.dtype == dtype:
            return value
        with np.errstate(over="ignore"):
            cast = value.astype(dtype)
        if dtype == np.float16 and np.isinf(cast).any() and not np.isinf(value).any():
            most = np.abs(value.astype(np.float32)).max()
            raise WeightError(f"{entry.name} holds {most:g}, which float16 (up to 65504) cannot; use bfloat16")
        return cast

    return read


def _open(source: Path, step: int | None) -> Source:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder (nothing is downloaded: give a local snapshot)")
    if run_folder.is_run(source):
        return _Run(source, step)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has neither config.json (Hugging Face) nor experiment.json (jvlm run)")
    if step is not None:
        raise ValueError(f"step {step}: {source} is a Hugging Face folder, which has no steps")
    return _Snapshot(source)


def _entries_of(config: VLMConfig) -> tuple[list[Entry], dict[str, tuple[int, ...]]]:
    """The tensors of a model in table order, and the shapes of its parameters by path."""
    shapes = {path: tuple(v.get_value().shape) for path, v in vlm.parameters(vlm.abstract(config)).items()}
    return table.entries(config, shapes), shapes


class _Snapshot:
    """A Hugging Face folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        # numerics given, because their default would start the device to ask for its kind
        self.config = checkpoint.read_config(folder, Numerics())
        self.entries, _ = _entries_of(self.config)
        self.tensors = safetensors_files.Tensors(folder)
        try:
            self.stored = checkpoint.match(self.tensors, table.architecture_of(self.config).canonical, self.entries)
            self.dtypes = self.tensors.dtypes(self.stored.values())
        except WeightError:
            self.close()
            raise

    def dtype(self, entry: Entry) -> np.dtype:
        return self.dtypes[self.stored[entry.name]]

    def read(self, entry: Entry) -> np.ndarray:
        return self.tensors.read(self.stored[entry.name])

    def write_sidecars(self, target: Path, dtype: str | None) -> None:
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name != "config.json":
                shutil.copyfile(file, target / file.name)
        if (self.folder / chat_templates.ADDITIONAL).is_dir():
            shutil.copytree(self.folder / chat_templates.ADDITIONAL, target / chat_templates.ADDITIONAL)
        if not tokenizer_files.is_portable(target):
            tokenizer_files.make_portable(target)
        values = json.loads((self.folder / "config.json").read_text())
        if dtype is not None:
            _set_dtype(values, dtype)
        (target / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self.tensors.close()


def _set_dtype(values: dict[str, Any], dtype: str) -> None:
    """Change the dtype that a config.json announces, under its old or new name, in every part that does."""
    parts = [values, *(v for v in values.values() if isinstance(v, dict))]
    for part in parts:
        for key in ("torch_dtype", "dtype"):
            if key in part:
                part[key] = dtype
    if not {"torch_dtype", "dtype"} & set(values):
        values["torch_dtype"] = dtype


class _Run:
    """A jvlm run: parameters stacked over layers, read chunk by chunk through tensorstore."""

    def __init__(self, folder: Path, step: int | None):
        self.folder = folder
        self.config = run_folder.model_config(folder)
        self.entries, shapes = _entries_of(self.config)
        self.arrays = run_folder.Arrays(run_folder.params_folder(folder, step), shapes)

    def dtype(self, entry: Entry) -> np.dtype:
        return self.arrays.dtype(entry.path)

    def read(self, entry: Entry) -> np.ndarray:
        return entry.to_checkpoint(self.arrays.read(entry.path, entry.layer))

    def write_sidecars(self, target: Path, dtype: str | None) -> None:
        processor = checkpoint.load_processor(self.folder / run_folder.PROCESSOR, self.config)
        embedding = next(e for e in self.entries if e.path == checkpoint.EMBEDDING)
        checkpoint.write_sidecars(target, self.config, processor, dtype or self.dtype(embedding).name)

    def close(self) -> None:
        self.arrays.close()

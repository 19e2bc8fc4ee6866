"""Checkpoints to Hugging Face folders, one tensor in memory at a time.

The source is a Hugging Face folder or a jvlm run. Nothing here builds a model: names and shapes come from the weight
table, so a checkpoint of any size converts on a machine that holds its largest tensor twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np

from jvlm import json_files
from jvlm.errors import UserError
from jvlm.hub.ids import require_id
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLMConfig
from jvlm.weights import (
    chat_templates,
    frozen,
    hf,
    run_dir,
    safetensors_files,
    table,
    tokenizer_files,
    vocabulary,
)
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
        """Return the tensor in the checkpoint's layout. Calls come in the order of ``entries``."""
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
    grow_embedding: bool = False,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder, reading and writing one tensor at a time.

    Args:
      source: a Hugging Face folder, a jvlm run, or an id on the Hub.
      target: a folder that does not exist or is empty. config.json is written last: without it nothing loads.
      layout: tensor names, "released" (as published checkpoints) or "transformers" (as >= 4.52 in memory).
      dtype: of every tensor; "keep" leaves each as it is stored.
      max_shard_bytes: start a new file above this size.
      step: which checkpoint of a run; None is the latest.
      grow_embedding: as in `jvlm.load`.
      on_tensor: called with name, number (from 1) and count as each tensor is written.

    Raises:
      UserError: no such source; the target is not empty.
      WeightError: wrong, missing or extra tensors, all of them listed, before anything is written; or values that
        float16 cannot hold, with all tensors that have some.
    """
    source, target = run_dir.local(source), Path(target)
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; give a new one")
    opened = open_source(source, step, grow_embedding)
    try:
        layouts = table.hf_format(opened.config).layouts
        if layout not in layouts:
            raise UserError(f"unknown layout {layout!r}; known: {', '.join(layouts)}")
        target.mkdir(parents=True, exist_ok=True)
        tensors = []
        for number, entry in enumerate(opened.entries, 1):
            name = layouts[layout](entry.name)
            wanted = opened.dtype(entry) if dtype == "keep" else np.dtype(dtype)
            notify = None if on_tensor is None else (lambda n=name, i=number: on_tensor(n, i, len(opened.entries)))
            tensors.append((name, wanted, entry.shape, _reader(opened, entry, notify)))
        fused = table.hf_format(opened.config).fused
        safetensors_files.write(target, safetensors_files.joined(tensors, fused), max_shard_bytes)
        opened.write_sidecars(target, None if dtype == "keep" else dtype)
    finally:
        opened.close()


def _reader(source: Source, entry: Entry, notify: Callable[[], None] | None) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        if notify is not None:
            notify()
        return source.read(entry)

    return read


def open_source(source: Path, step: int | None = None, grow_embedding: bool = False) -> Source:
    """Return the tensors of a folder. Raises UserError and WeightError as `convert` does."""
    if not source.is_dir():
        require_id(source)
        raise UserError(f"{source} is not a folder")
    if run_dir.is_run(source):
        return _Run(source, step, grow_embedding)
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has neither config.json (Hugging Face) nor experiment.json (jvlm run)")
    if step is not None:
        raise UserError(f"step {step}: {source} is a Hugging Face folder, which has no steps")
    return _Snapshot(source, grow_embedding)


def _entries_of(config: VLMConfig) -> tuple[list[Entry], Mapping[str, tuple[int, ...]]]:
    """Return the tensors of a model in table order, and the shapes of its parameters by path."""
    shapes = vlm.parameter_shapes(config)
    return table.entries(config, shapes), shapes


class _Snapshot:
    """A Hugging Face folder."""

    def __init__(self, folder: Path, grow_embedding: bool):
        self.folder, self.processor = folder, None
        # precision given, because their default would start the device to ask for its kind
        self.config = hf.read_config(folder, Precision())
        rows = None
        if grow_embedding:
            self.processor = hf.load_processor(folder, self.config, grow_embedding=True)
            rows, self.config = self.config.decoder.vocab_size, self.processor.model
        self.entries, _ = _entries_of(self.config)
        self.tensors = safetensors_files.Tensors(folder)
        try:
            form = table.hf_format(self.config)
            self.tensors.split(form.fused)
            self.stored = hf.match(self.tensors, form.canonical, self.entries, rows)
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
        values = json_files.read_object(self.folder / "config.json")
        if dtype is not None:
            _set_dtype(values, dtype)
        classes = table.hf_format(self.config).tokenizer_classes
        if self.processor is not None:
            tokenizer_files.save(self.processor.tokenizer, target, self.processor.template.templates, classes)
            _set_vocabulary(values, self.config.decoder.vocab_size)
        elif not tokenizer_files.is_portable(target):
            tokenizer_files.make_portable(target, classes=classes)
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


def _set_vocabulary(values: dict[str, Any], rows: int) -> None:
    """Change the number of tokens in a config.json, at its root, in its ``text_config``, or in both."""
    text = values.get("text_config")
    if text is not None:
        text["vocab_size"] = rows
    if text is None or "vocab_size" in values:
        values["vocab_size"] = rows


class _Run:
    """A jvlm run: parameters stacked over layers, read chunk by chunk through tensorstore."""

    def __init__(self, folder: Path, step: int | None, grow_embedding: bool):
        self.config = run_dir.model_config(folder)
        _, shapes = _entries_of(self.config)
        self.processor = hf.load_processor(folder / run_dir.PROCESSOR, self.config, grow_embedding=grow_embedding)
        self.config = self.processor.model
        self.entries, _ = _entries_of(self.config)
        self.arrays = frozen.open_run(folder, shapes, step)

    def dtype(self, entry: Entry) -> np.dtype:
        return self.arrays.dtype(entry.path)

    def read(self, entry: Entry) -> np.ndarray:
        value = entry.to_checkpoint(self.arrays.read(entry.path, entry.layer))
        return value if value.shape == entry.shape else vocabulary.with_rows(value, entry.shape[0])

    def write_sidecars(self, target: Path, dtype: str | None) -> None:
        embedding = next(e for e in self.entries if e.path == hf.EMBEDDING)
        hf.write_sidecars(target, self.config, self.processor, dtype or self.dtype(embedding).name)

    def close(self) -> None:
        self.arrays.close()

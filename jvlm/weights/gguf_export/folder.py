"""A model as the GGUF files that llama.cpp serves it from: `jvlm export --to_gguf`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.weights import convert, hf, run_dir
from jvlm.weights.gguf_export import files
from jvlm.weights.gguf_export.files import FORMATS, ReadLayer, Written
from jvlm.weights.gguf_export.text import write_text
from jvlm.weights.gguf_export.vision import vision_form, write_vision


def export(
    model: VLM,
    processor: Processor,
    folder: Path,
    *,
    format: str = "f16",
    vision_format: str = "f16",
    read: ReadLayer | None = None,
    name: str | None = None,
) -> list[Written]:
    """Write NAME-FORMAT.gguf and, where llama.cpp has a form of the vision tower, mmproj-NAME-FORMAT.gguf.

    Of other models only the language model is written, and a line says so.

    Args:
      format: of the language model's matrices, one of f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0.
      vision_format: of the vision tower's.
      read: gives a parameter's value by path, or one layer of it; None takes those of the model.
      name: of the model and its files; None is that of the folder.

    Raises:
      UserError: as `write_text` and `write_vision`; files that are there already.
    """
    for given in (format, vision_format):
        if given not in FORMATS:
            raise UserError(f"unknown GGUF format {given!r}; known: {', '.join(FORMATS)}")
    name = name or folder.absolute().name
    text, vision = folder / f"{name}-{format}.gguf", folder / f"mmproj-{name}-{vision_format}.gguf"
    for path in (text, vision):
        files.require_new(path)
    tokenizer = processor.tokenizer
    written = [write_text(model, text, format=format, read=read, processor_tokenizer=tokenizer, name=name)]
    if vision_form(model.config) is not None:
        written.append(write_vision(model, vision, format=vision_format, read=read, name=name))
    else:
        print(f"the vision tower of {model.config.family} has no form in llama.cpp: only the language model is written")
    return written


def export_folder(
    source: str | Path,
    folder: Path,
    *,
    format: str = "f16",
    vision_format: str = "f16",
    step: int | None = None,
    name: str | None = None,
) -> list[Written]:
    """Write the files of `export` from a Hugging Face folder, a run or an id, with one tensor in memory at a time.

    Raises: as `export` and `jvlm.weights.convert.convert`.
    """
    source = run_dir.local(source)
    opened = convert.open_source(source, step)
    try:
        beside = source / run_dir.PROCESSOR if run_dir.is_run(source) else source
        processor = hf.load_processor(beside, opened.config)
        entries = {(entry.path, entry.layer): entry for entry in opened.entries}

        def read(path: str, layer: int | None) -> np.ndarray:
            entry = entries[path, layer]
            return entry.to_param(opened.read(entry))

        model = vlm.abstract(opened.config)
        options = {"format": format, "vision_format": vision_format, "name": name}
        return export(model, processor, folder, read=read, **options)
    finally:
        opened.close()

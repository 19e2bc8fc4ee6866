"""The vision tower and connector of a VLM as the GGUF file that llama.cpp calls mmproj."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jvlm import families
from jvlm.errors import UserError
from jvlm.families.gguf import GGUFVision
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.weights.gguf_export import files
from jvlm.weights.gguf_export.files import ReadLayer, Tensor, Written


def vision_form(config: VLMConfig) -> GGUFVision | None:
    """Return llama.cpp's form of a model's vision tower; None where it has none."""
    form = families.get(config.family).gguf
    return None if form is None else form.vision


def write_vision(
    model: VLM, path: Path, *, format: str = "f16", read: ReadLayer | None = None, name: str | None = None
) -> Written:
    """Write the vision tower and connector. Arguments are those of `write_text`.

    A fine-tuned vision tower needs a file of its own: with that of the base its training is lost without a word.

    Raises:
      UserError: a family of whose vision towers llama.cpp has no form; a tower that it computes otherwise; a model with
        adapters.
    """
    form = vision_form(model.config)
    if form is None:
        known = [name for name in families.names() if (gguf := families.get(name).gguf) and gguf.vision]
        raise UserError(
            f"the vision tower of {model.config.family} has no GGUF form in llama.cpp; written are those of "
            f"{', '.join(known)}. Serve the Hugging Face folder"
        )

    def keys(writer: Any) -> None:
        writer.add_clip_has_vision_encoder(True)
        form.add_keys(writer, model.config)

    tensors = _tensors(form, model, read or files.values_of(model))
    return files.write_model(model, path, "clip", "mmproj", keys, tensors, format=format, name=name)


def _tensors(form: GGUFVision, model: VLM, read: ReadLayer) -> Iterator[Tensor]:
    for entry in files.entries(model):
        stored = np.broadcast_to(np.zeros((), np.float32), entry.shape)  # its shape, without its memory
        for name, part in form.tensors(entry.name, model.config):
            yield Tensor(
                name,
                part(stored).shape,
                lambda e=entry, p=part: p(e.to_checkpoint(read(e.path, e.layer))),
            )

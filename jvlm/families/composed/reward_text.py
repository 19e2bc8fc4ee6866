"""Reward models of text alone, from a language model's folder, and folders of them for transformers."""

from __future__ import annotations

from pathlib import Path

from jvlm import json_files
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.families.composed.compose import compose_text
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.training.side_files import write_json
from jvlm.weights import hf, labels, safetensors_files, table
from jvlm.weights.rules import transformer

# MiMo-7B computes what Qwen2 does; transformers has no class of its own for it
_MODEL_TYPES = {"mimo": ("qwen2", "Qwen2ForCausalLM")}


def text_model(folder: str | Path, precision: Precision = Precision()) -> VLMConfig:
    """Return the configuration of a model of text alone on a language model's folder.

    Use it with ``decoder_from`` and ``tokenizer`` of the same folder, ``adapt.labels = 1``, ``data.max_patches = 0``.
    """
    return compose_text(folder, precision=precision)


def save_text(model: VLM, processor: Processor, folder: Path, *, base: Path, dtype: str | None = None) -> None:
    """Write a folder that transformers' AutoModelForSequenceClassification reads.

    Args:
      base: folder of the language model that it began as, whose config.json is taken over.
      dtype: of the tensors; None keeps theirs.

    Raises:
      UserError: a model with adapters, or without scores.
    """
    decoder = model.config.decoder
    if model.adapters is not None:
        raise UserError("the model has adapters: merge them first (jvlm.adapters.merge.merge)")
    if not getattr(decoder, "labels", None):
        raise UserError("this is no reward model: it gives no scores (adapt.labels = 1 makes one)")
    values = json_files.read_object(base / "config.json")
    kind, name = _MODEL_TYPES.get(
        values["model_type"], (values["model_type"], (values.get("architectures") or [""])[0])
    )
    if not name:
        raise UserError(f"{base / 'config.json'} names no architecture: give the class of the language model there")
    values = {k: v for k, v in values.items() if k not in ("auto_map", "num_nextn_predict_layers")}
    folder.mkdir(parents=True, exist_ok=True)
    variables = {p: v for p, v in vlm.parameters(model).items() if p.startswith("decoder.")}
    shapes = {path: tuple(v.get_value().shape) for path, v in variables.items()}
    read = hf.values_of(variables)
    written = [
        (
            entry.name,
            safetensors_files.dtype_of(dtype or hf.stored_dtype(variables[entry.path], entry.layer)),
            entry.shape,
            lambda entry=entry: entry.to_checkpoint(read(entry.path, entry.layer)),
        )
        for entry in table.expand(transformer(decoder), {}, shapes)
    ]
    safetensors_files.write(folder, written)
    stop = model.config.end_token_ids
    config = {
        **values,
        **labels.fields_of(decoder.labels, [name]),
        "model_type": kind,
        "vocab_size": decoder.vocab_size,
        "torch_dtype": written[0][1].name,
        # whose place tells transformers where a row's last token is
        "pad_token_id": processor.tokenizer.pad_token_id if processor.tokenizer.pad_token_id is not None else stop[0],
    }
    write_json(folder / "config.json", config)
    hf.write_processor(folder, model.config, processor)

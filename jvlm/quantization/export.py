"""Hugging Face folders with a quantised language model, as compressed-tensors has them; vLLM and SGLang read these."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM, parameters
from jvlm.quantization import formats
from jvlm.quantization.calibration import RoundedModel, RoundingConfig, round_model
from jvlm.quantization.packing import packed
from jvlm.quantization.rounding import Rounded
from jvlm.weights import hf, safetensors_files, table
from jvlm.weights.vocabulary import EMBEDDING


def export_quantized(
    model: VLM,
    processor: Processor,
    folder: str | Path,
    config: RoundingConfig,
    *,
    examples: Iterable[PackedBatch] | None = None,
    dtype: str | None = None,
    layout: str = "released",
    max_shard_bytes: int = 5 * 10**9,
) -> RoundedModel:
    """Write a folder as `jvlm.save` does, with the language model's matrices as fp8 or packed integers.

    The vision tower, the connector, embeddings and the head keep their values, and are listed as ignored.

    Args:
      examples: batches to calibrate on, which "gptq" and "awq" need; with them the error of outputs is measured.
      dtype: of all else, and of scales; None as in `jvlm.save`.

    Returns:
      what was written for each matrix, and its error; `RoundedModel.report` is the text for users.

    Raises:
      UserError: see `round_model`; a folder that exists and is not empty.
      WeightError: as `jvlm.save`.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give another folder")
    variables = parameters(model)
    form = table.export_format(model.config)
    scale_dtype = dtype or hf.stored_dtype(variables[EMBEDDING], None)
    if scale_dtype == "float16" and config.method == "fp8":
        raise UserError("scales of fp8 do not fit float16; give dtype bfloat16 or float32")
    safetensors_files.dtype_of(scale_dtype)
    rounded = round_model(model, config, examples, scale_dtype)
    values = hf.values_of(variables)

    def read(path: str, layer: int | None) -> np.ndarray:
        changed = rounded.replaced.get((path, layer or 0))
        return values(path, layer) if changed is None else changed

    def encode(entry: table.Entry) -> list[Any] | None:
        matrix = rounded.matrices.get((entry.path, entry.layer or 0))
        return None if matrix is None else _encoded(matrix, config)

    hf.save(
        model, processor, folder, dtype=dtype, layout=layout, max_shard_bytes=max_shard_bytes, read=read, encode=encode
    )
    shapes = {path: tuple(v.get_value().shape) for path, v in variables.items()}
    plain = [e for e in table.entries(model.config, shapes) if (e.path, e.layer or 0) not in rounded.matrices]
    path = folder / "config.json"
    written = json.loads(path.read_text())
    written["quantization_config"] = quantization_config(config, ignored(plain, form.layouts[layout]))
    path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    return rounded


def _encoded(matrix: Rounded, config: RoundingConfig) -> list[tuple[str, np.dtype, tuple[int, ...], Callable]]:
    """Return what is written for a matrix: name's end, dtype, shape and values."""
    scale = ("weight_scale", matrix.scale.dtype, matrix.scale.shape, lambda: matrix.scale)
    shape = matrix.codes.shape
    if config.method == "fp8":
        return [("weight", formats.FP8, shape, lambda: matrix.codes.view(formats.FP8)), scale]
    words = -(-shape[1] // (32 // config.bits))
    return [
        ("weight_packed", np.dtype(np.int32), (shape[0], words), lambda: packed(matrix.codes, config.bits)),
        scale,
        ("weight_shape", np.dtype(np.int64), (2,), lambda: np.array(shape, np.int64)),
    ]


def ignored(entries: Iterable[table.Entry], rename: Callable[[str], str]) -> list[str]:
    """Return the modules that stay as they are: the head, and a pattern for each other tower."""
    names = [rename(entry.name) for entry in entries if entry.path.startswith(("encoder.", "connector."))]
    towers = {name.removeprefix("model.").partition(".")[0] for name in names}
    return ["lm_head", *(f"re:.*{tower}.*" for tower in sorted(towers))]


def quantization_config(config: RoundingConfig, ignore: list[str]) -> dict[str, Any]:
    """Return ``quantization_config`` of config.json. With fp8, servers quantise activations too, token by token."""
    weights = {"dynamic": False, "symmetric": True, "actorder": None, "block_structure": None}
    activations = None
    if config.method == "fp8":
        weights |= {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}
        activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    else:
        weights |= {"num_bits": config.bits, "type": "int", "strategy": "group", "group_size": config.group_size}
    form = "float-quantized" if config.method == "fp8" else "pack-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }

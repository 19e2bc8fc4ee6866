"""GGUF and ONNX files to Hugging Face folders, so that what is published only so can start a model.

Needs the extra ``backbones``. Quantised tensors come out as float32: exact values of the quantised model, not of the
one that it was made from.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jvlm.errors import UserError
from jvlm.weights import backbones, gguf_files, safetensors_files
from jvlm.weights.table import WeightError

_DINOV2_HEAD = 64  # in all sizes; an ONNX file does not say


def unpack(source: Path, target: Path) -> None:
    """Write what a ``.gguf`` (Llama) or ``.onnx`` (DINOv2 backbone) file holds as a Hugging Face folder.

    Nothing is written unless all of it can be read, and loads again.

    Raises:
      UserError: no such source; the target exists and is not empty.
      WeightError: a file that is cut or damaged, or a kind of model that is not supported.
    """
    if not source.is_file():
        raise UserError(f"{source} is not a file")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; give a new one")
    tokenizer = None
    if source.suffix == ".gguf":
        config, tensors, tokenizer = gguf_files.read(source)
    else:
        config, tensors = _read_onnx(source)
    backbones.check_tensors(source, config, {name: value.shape for name, value in tensors.items()})
    target.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(target))
    dtype = np.dtype(np.float32)
    safetensors_files.write(
        target,
        [(n, dtype, v.shape, lambda v=v: np.ascontiguousarray(v, dtype)) for n, v in tensors.items()],
    )
    # last: without it nothing loads
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _read_onnx(source: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise WeightError(f"{source}: ONNX files are read with onnx: pip install 'jvlm[backbones]'") from error
    try:
        graph = onnx.load(str(source)).graph
        arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    except Exception as error:
        raise WeightError(
            f"{source} cannot be read as ONNX ({type(error).__name__}: {error}): it is cut short or damaged, or the "
            "file with its weights is not beside it; download it again"
        ) from error
    tensors = {n.removeprefix("backbone."): v for n, v in arrays.items() if n.startswith("backbone.")}
    parts = []
    for node in graph.node:
        own = [arrays[name] for name in node.input if name in arrays]
        scope = node.name.strip("/").split("/")
        if node.op_type == "MatMul" and own and scope[0] == "backbone":
            # the export stores a linear map's weight transposed, without its name: the node that uses it tells
            tensors[".".join(scope[1:-1]) + ".weight"] = own[0].T
        elif scope[:2] == ["backbone", "embeddings"] and node.op_type in ("Concat", "Reshape"):
            # the position table lies in two pieces, the class token's and the patches'
            parts += [array for array in own if array.ndim == 3]
    needed = {"embeddings.cls_token", "embeddings.patch_embeddings.projection.weight", "encoder.layer.0.mlp.fc1.bias"}
    if not needed <= tensors.keys() or len(parts) != 2:
        raise WeightError(f"{source}: not a DINOv2 backbone as transformers exports it")
    tensors["embeddings.position_embeddings"] = np.concatenate(sorted(parts, key=lambda a: a.shape[1]), axis=1)
    width, channels, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(m[1]) for n in tensors if (m := re.match(r"encoder\.layer\.(\d+)\.", n))),
        "num_attention_heads": width // _DINOV2_HEAD,
        "mlp_ratio": tensors["encoder.layer.0.mlp.fc1.bias"].size // width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * round((tensors["embeddings.position_embeddings"].shape[1] - 1) ** 0.5),
        "layer_norm_eps": 1e-6,
    }
    return config, tensors

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

from jvlm.weights import safetensors_files
from jvlm.weights.table import WeightError

_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_DINOV2_HEAD = 64  # in all sizes; an ONNX file does not say


def unpack(source: Path, target: Path) -> None:
    """Write what a ``.gguf`` (Llama) or ``.onnx`` (DINOv2 backbone) file holds as a Hugging Face folder.

    Raises:
      FileExistsError: the target exists and is not empty.
      WeightError: a kind of model that is not supported.
    """
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty")
    target.mkdir(parents=True, exist_ok=True)
    (_unpack_gguf if source.suffix == ".gguf" else _unpack_onnx)(source, target)


def _write(target: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    dtype = np.dtype(np.float32)
    safetensors_files.write(
        target,
        [(n, dtype, v.shape, lambda v=v: np.ascontiguousarray(v, dtype)) for n, v in tensors.items()],
    )


def _unpack_gguf(source: Path, target: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import AutoTokenizer

    reader = GGUFReader(source)

    def value(key: str, default: Any = None) -> Any:
        return reader.fields[key].contents() if key in reader.fields else default

    kind = value("general.architecture")
    if kind != "llama":
        raise WeightError(f"{source}: GGUF files of {kind!r} models are not supported; supported: llama")
    heads = value("llama.attention.head_count")
    kv_heads = value("llama.attention.head_count_kv", heads)
    tensors = {}
    for tensor in reader.tensors:
        name = _gguf_name(tensor.name, source)
        array = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(int(n) for n in tensor.shape[::-1]))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = _halves(array, heads if "q_proj" in name else kv_heads)
        tensors[name] = array
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": int(tensors["model.embed_tokens.weight"].shape[0]),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": value("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": value("llama.context_length"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
    }
    _write(target, config, tensors)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name, local_files_only=True)
    tokenizer.save_pretrained(str(target))


def _gguf_name(name: str, source: Path) -> str:
    match = re.fullmatch(r"(blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[3] not in _GGUF_NAMES:
        raise WeightError(f"{source}: tensor {name} has no place in a Llama model")
    layer = f"model.layers.{match[2]}." if match[1] else ""
    return f"{layer}{_GGUF_NAMES[match[3]]}.{match[4]}"


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """From rotary pairs side by side, as llama.cpp stores queries and keys, to the first and second half of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _unpack_onnx(source: Path, target: Path) -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(source)).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
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
    if "embeddings.cls_token" not in tensors or len(parts) != 2:
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
    _write(target, config, tensors)

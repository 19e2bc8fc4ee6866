"""GGUF files of Llama models: their configuration and tensors, as Hugging Face has them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jvlm.models.layers import RopeScaling, rotary_frequencies
from jvlm.weights.table import WeightError

_NAMES = {
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
_ROPE_FACTORS = "rope_freqs.weight"
# Contexts that models with Llama 3's scaling were pre-trained on; a file has the factors that follow, not the context.
_CONTEXTS = tuple(2**n for n in range(4, 21))
# Keys under "llama." whose value changes what the model computes, and the values at which it computes a plain Llama.
_PLAIN = {
    "expert_count": (None, 0),
    "attention.sliding_window": (None, 0),
    "rope.scale_linear": (None, 1.0),
    "logit_scale": (None, 1.0),
    "residual_scale": (None, 1.0),
    "embedding_scale": (None, 1.0),
    "attention.scale": (None, 0.0),
    "attention.clamp_kqv": (None, 0.0),
}


def read(source: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], Any]:
    """Return (values of config.json, float32 tensors, tokenizer) of a GGUF file.

    Raises:
      WeightError: another kind of file; one that is cut or damaged; a model, an option or a quantisation that is not
        supported. The message names the file.
    """
    with open(source, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise WeightError(f"{source} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise WeightError(f"{source}: GGUF files are read with gguf: pip install 'jvlm[backbones]'") from error
    try:
        reader = GGUFReader(source)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:
        raise WeightError(
            f"{source} cannot be read as GGUF ({_message(error)}): it is cut short, damaged, or of a kind that the "
            "installed gguf does not know; download it again"
        ) from error
    header = _Header(source, fields)
    config = header.config()
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors, factors = {}, None
    for tensor in reader.tensors:
        try:
            array = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(int(n) for n in tensor.shape[::-1]))
        except Exception as error:
            raise WeightError(
                f"{source}: tensor {tensor.name}, stored as {tensor.tensor_type.name}, cannot be read "
                f"({_message(error)})"
            ) from error
        if tensor.name == _ROPE_FACTORS:
            factors = array
            continue
        name = _name(tensor.name, source)
        part = name.split(".")[-2]
        tensors[name] = _halves(array, heads[part]) if part in heads else array
    if "model.embed_tokens.weight" not in tensors:
        raise WeightError(f"{source} has no tensor token_embd.weight: it is no whole model")
    config["vocab_size"] = int(tensors["model.embed_tokens.weight"].shape[0])
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    config["rope_scaling"] = header.rope_scaling(config, factors)
    return config, tensors, _tokenizer(source)


class _Header:
    """The keys of a file."""

    def __init__(self, source: Path, fields: dict[str, Any]):
        self.source, self.fields = source, fields
        kind = fields.get("general.architecture")
        if kind != "llama":
            raise WeightError(f"{source}: GGUF files of {kind!r} models are not supported; supported: llama")
        parts = fields.get("split.count") or 1
        if parts > 1:
            raise WeightError(f"{source} is one of {parts} files of a model: merge them with llama-gguf-split --merge")
        for name, plain in _PLAIN.items():
            value = self.value(name)
            if value not in plain:
                raise WeightError(f"{source}: llama.{name} = {value!r} is not supported")

    def value(self, name: str, default: Any = None) -> Any:
        return self.fields.get(f"llama.{name}", default)

    def number(self, name: str, kind: Callable[[Any], Any] = int) -> Any:
        """Return a number that must be there."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise WeightError(f"{self.source}: llama.{name} is {value!r}; a positive number is needed")
        return kind(value)

    def config(self) -> dict[str, Any]:
        width, heads = self.number("embedding_length"), self.number("attention.head_count")
        size = self.number("attention.key_length") if self.value("attention.key_length") else width // heads
        others = {"attention.value_length": "values", "rope.dimension_count": "the rotary embedding"}
        for name, what in others.items():
            if self.value(name, size) != size:
                raise WeightError(
                    f"{self.source}: llama.{name} = {self.value(name)!r}, but heads are {size} wide: another width of "
                    f"{what} is not supported"
                )
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": width,
            "intermediate_size": self.number("feed_forward_length"),
            "num_hidden_layers": self.number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.number("attention.head_count_kv")
            if self.value("attention.head_count_kv") is not None
            else heads,
            "head_dim": size,
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", float),
            "rope_theta": self.number("rope.freq_base", float) if self.value("rope.freq_base") else 10000.0,
            "max_position_embeddings": self.number("context_length"),
            "bos_token_id": self.fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.fields.get("tokenizer.ggml.eos_token_id"),
        }

    def rope_scaling(self, config: dict[str, Any], factors: np.ndarray | None) -> dict[str, Any] | None:
        """Linear scaling from its keys, Llama 3's from its table of factors."""
        kind = self.value("rope.scaling.type", "none")
        if kind not in ("none", "linear") or (kind != "none" and factors is not None):
            raise WeightError(
                f"{self.source}: llama.rope.scaling.type = {kind!r} is not supported; supported: none, linear, and "
                f"Llama 3's table {_ROPE_FACTORS}"
            )
        if kind == "linear":
            return {"rope_type": "linear", "factor": self.number("rope.scaling.factor", float)}
        if factors is None:
            return None
        plain = rotary_frequencies(config["head_dim"], config["rope_theta"])
        if factors.shape == plain.shape and np.isfinite(factors).all():
            # the longest wave is divided by the whole factor, and the shortest by none
            factor = float(factors[-1])
            for context in _CONTEXTS:
                scaling = RopeScaling("llama3", factor, original_max_position_embeddings=context)
                if np.allclose(scaling(plain) * factors, plain, rtol=1e-4):
                    return {
                        "rope_type": "llama3",
                        "factor": factor,
                        "low_freq_factor": scaling.low_freq_factor,
                        "high_freq_factor": scaling.high_freq_factor,
                        "original_max_position_embeddings": context,
                    }
        raise WeightError(
            f"{self.source}: the factors of {_ROPE_FACTORS} are not Llama 3's for any context of 16 to 1048576 tokens; "
            "others are not supported"
        )


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name, local_files_only=True)
    except Exception as error:
        raise WeightError(f"{source}: its tokenizer cannot be read by transformers ({_message(error)})") from error


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _name(name: str, source: Path) -> str:
    match = re.fullmatch(r"(blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[3] not in _NAMES:
        raise WeightError(f"{source}: tensor {name} is no tensor of a Llama model")
    layer = f"model.layers.{match[2]}." if match[1] else ""
    return f"{layer}{_NAMES[match[3]]}.weight"


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """From rotary pairs side by side, as llama.cpp stores queries and keys, to the first and second half of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)

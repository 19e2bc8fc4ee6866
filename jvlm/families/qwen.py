"""What the families of Qwen's vision-language models share: token ids, tensor names, parts of config.json.

Qwen2-VL, Qwen2.5-VL and MiMo-VL have a flat config.json, with the fields of the language model at its top; Qwen3-VL's
is nested.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.native_vit import NativeViTConfig
from jvlm.models.token_ids import end_token_id
from jvlm.models.vlm import VLMConfig
from jvlm.weights.rules import linear
from jvlm.weights.table import Rule, WeightError

# In every released tokenizer.
TOKEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_pad_token_id": 151654,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
# the processors of transformers 4 take no tokenizer of another class
TOKENIZER_CLASSES = ("Qwen2Tokenizer",)


def patches(name: str) -> Rule:
    """Return the weight of the convolution that embeds patches."""
    return Rule(f"{name}.patch_embed.proj.weight", "encoder.patch_embed.kernel", "d c t y x -> (c t y x) d")


def attention(name: str, path: str) -> list[Rule]:
    """Return the attention of a layer of the vision tower: one matrix for queries, keys and values."""
    return [
        Rule(f"{name}.qkv.weight", f"{path}.qkv_by_head.kernel", "(qkv h k) i -> i (h qkv k)"),
        Rule(f"{name}.qkv.bias", f"{path}.qkv_by_head.bias", "(qkv h k) -> (h qkv k)"),
        *linear(f"{name}.proj", f"{path}.out", bias=True),
    ]


def axis_sizes(config: VLMConfig) -> dict[str, int]:
    """Return the lengths of the axes that these rules take apart."""
    vit = config.encoder
    patch = {"c": vit.in_channels, "t": vit.temporal_patch_size, "y": vit.patch_size, "x": vit.patch_size}
    return {**patch, "qkv": 3, "h": vit.num_heads, "k": vit.head_dim}


def canonical(name: str) -> str | None:
    """Return the older one of the two names, which every released checkpoint of a flat config.json uses."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def new_layout(name: str) -> str:
    """Return the name that transformers >= 4.52 uses in memory."""
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?!visual\.)", "model.language_model.", name)


LAYOUTS = {"released": lambda name: name, "transformers": new_layout}


def flat_text(values: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's fields of a config.json of any age, flat or with ``text_config``."""
    return {**values, **(values.get("text_config") or {})}


def check(expected: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise WeightError for the first field, of name to (value, the only one that is supported), that differs."""
    for name, (value, supported) in expected.items():
        if value != supported:
            raise WeightError(f"{name} {value!r} is not supported; supported: {supported!r}")


def check_width(vision: dict[str, Any], field: str, text: dict[str, Any]) -> None:
    """Raise WeightError where the vision tower is for a language model of another width."""
    if vision.get(field, text["hidden_size"]) != text["hidden_size"]:
        raise WeightError(f"vision_config.{field} {vision[field]} must equal hidden_size {text['hidden_size']}")


def vision_sizes(vision: dict[str, Any], default: NativeViTConfig) -> dict[str, Any]:
    """Return the fields that all vision towers have; where they are missing, those of ``default``."""
    old_names = {"in_channels": "in_chans", "patch_size": "spatial_patch_size"}
    names = "depth hidden_size num_heads intermediate_size in_channels patch_size temporal_patch_size".split()
    return {
        name: vision.get(name, vision.get(old_names.get(name, ""), getattr(default, name)))
        for name in (*names, "spatial_merge_size")
    }


def decoder_sizes(values: dict[str, Any], text: dict[str, Any], *, eps: float, positions: int) -> dict[str, Any]:
    """Return the fields that all language models have.

    Args:
      eps, positions: ``rms_norm_eps`` and ``max_position_embeddings`` where they are missing.
    """
    heads = text["num_attention_heads"]
    return {
        "vocab_size": text["vocab_size"],
        "hidden_size": text["hidden_size"],
        "num_layers": text["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": text.get("num_key_value_heads") or heads,
        "intermediate_size": text["intermediate_size"],
        "rms_norm_eps": text.get("rms_norm_eps", eps),
        # before transformers 5 the nested configuration alone may say so
        "tie_word_embeddings": bool(values.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        "max_position_embeddings": text.get("max_position_embeddings", positions),
    }


def written_sizes(llm: TransformerConfig) -> dict[str, Any]:
    """Return the inverse of `decoder_sizes`."""
    return {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.intermediate_size,
        "max_position_embeddings": llm.max_position_embeddings,
        "num_attention_heads": llm.num_heads,
        "num_hidden_layers": llm.num_layers,
        "num_key_value_heads": llm.num_kv_heads,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_theta": llm.rope_theta,
        "tie_word_embeddings": llm.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": llm.vocab_size,
    }


def flat_decoder(values: dict[str, Any], *, eps: float = 1e-6, positions: int = 128000) -> TransformerConfig:
    """Return the language model of a flat config.json: Qwen2 with M-RoPE.

    Raises:
      WeightError: an option that the decoder does not have.
    """
    text = flat_text(values)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise WeightError(f"rope type {kind!r} is not supported; supported: default, mrope")
    if text.get("use_sliding_window"):
        raise WeightError("use_sliding_window=true is not supported by this architecture's decoder")
    check({"config: hidden_act": (text.get("hidden_act", "silu"), "silu")})
    return TransformerConfig(
        **decoder_sizes(values, text, eps=eps, positions=positions),
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
        mrope_section=tuple(rope.get("mrope_section") or _default_section(text)),
    )


def _default_section(text: dict[str, Any]) -> tuple[int, int, int]:
    head = text["hidden_size"] // text["num_attention_heads"]
    if head == 128:
        return (16, 24, 24)
    raise WeightError(f"mrope_section is missing and has no default for heads of {head}")


def flat_token_ids(values: dict[str, Any]) -> dict[str, Any]:
    """Return the special token ids of a flat config.json; those of media follow the start of an image by default."""
    ids = {k: v for part in (flat_text(values), values) for k, v in part.items() if v is not None}
    start = ids.get("vision_start_token_id", TOKEN_IDS["vision_start_token_id"])
    end = ids.get("vision_end_token_id", start + 1)
    return {
        "image_token_id": ids.get("image_token_id", TOKEN_IDS["image_token_id"]),
        "video_token_id": ids.get("video_token_id", TOKEN_IDS["video_token_id"]),
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "vision_pad_token_id": ids.get("vision_token_id", end + 1),
        "bos_token_id": ids.get("bos_token_id"),
        "eos_token_id": end_token_id(values, {**TOKEN_IDS, **(values.get("text_config") or values)}),
    }


def written_flat(config: VLMConfig) -> dict[str, Any]:
    """Return a flat config.json without its vision_config: read by transformers 4.49 and everything after it."""
    llm = config.decoder
    return {
        **written_sizes(llm),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "vision_token_id": config.vision_pad_token_id,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "initializer_range": config.precision.initializer_range or 0.02,
        "max_window_layers": llm.num_layers,
        "rope_scaling": {"type": "mrope", "mrope_section": list(llm.mrope_section)},
        "sliding_window": 32768,
        "use_sliding_window": False,
    }


def written_vision(vit: NativeViTConfig) -> dict[str, Any]:
    """Return the fields of vision_config that all of these models write."""
    return {
        "depth": vit.depth,
        "num_heads": vit.num_heads,
        "in_channels": vit.in_channels,
        "patch_size": vit.patch_size,
        "spatial_merge_size": vit.spatial_merge_size,
        "temporal_patch_size": vit.temporal_patch_size,
    }

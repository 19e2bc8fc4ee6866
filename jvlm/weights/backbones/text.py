"""Language models with Llama's tensor names: Llama (SmolLM2), Mistral, Qwen2, Qwen2.5, Qwen3 and MiMo-7B.

They become the decoder of a new model. What they say about media (M-RoPE) is the new model's own affair: their rotary
embedding is one-dimensional here, as it is for text.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jvlm.models import layers
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.weights.backbones import Backbone
from jvlm.weights.labels import count_of
from jvlm.weights.rules import transformer
from jvlm.weights.table import WeightError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "mimo")
# where a configuration leaves them out, as transformers fills them in
_THETA = {"llama": 10000.0, "mistral": 10000.0, "qwen2": 10000.0, "qwen3": 10000.0, "mimo": 640000.0}
_EPS = {"qwen2": 1e-6, "qwen3": 1e-6, "llama": 1e-6, "mistral": 1e-6, "mimo": 1e-5}


def read_config(values: dict[str, Any]) -> TransformerConfig:
    """Return a config.json, or the ``text_config`` of one.

    Raises:
      WeightError: an option that the decoder does not have.
    """
    kind = values["model_type"]
    if values.get("hidden_act", "silu") != "silu":
        raise WeightError(f"hidden_act {values['hidden_act']!r} is not supported for {kind}; supported: silu")
    if values.get("mlp_bias"):
        raise WeightError(f"mlp_bias=true is not supported for {kind}")
    if values.get("attention_bias") and kind != "qwen2":
        raise WeightError(f"attention_bias=true is not supported for {kind}: its output map would have a bias")
    rope = {"rope_theta": values.get("rope_theta"), **(values.get("rope_scaling") or {})}
    rope.update(values.get("rope_parameters") or {})
    heads = values["num_attention_heads"]
    return TransformerConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or (128 if kind == "qwen3" else None),
        intermediate_size=values["intermediate_size"],
        rms_norm_eps=values.get("rms_norm_eps", _EPS[kind]),
        qkv_bias=kind in ("qwen2", "mimo"),
        qk_norm=kind == "qwen3",
        rope_theta=float(rope.get("rope_theta") or _THETA[kind]),
        rope_scaling=read_rope_scaling(rope),
        sliding_window=_window(kind, values),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        max_position_embeddings=values.get("max_position_embeddings", 32768),
        labels=count_of(values),
    )


def write_config(config: TransformerConfig, kind: Literal["llama", "mistral"]) -> dict[str, Any]:
    """Return the inverse of `read_config`, without token ids.

    Raises:
      WeightError: a decoder that has more than models of this kind.
    """
    names = (
        "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size rms_norm_eps rope_theta "
        "tie_word_embeddings max_position_embeddings"
    ).split()
    own = "rope_scaling" if kind == "llama" else "sliding_window"
    plain = TransformerConfig(qkv_bias=False, **{name: getattr(config, name) for name in (*names, own)})
    if plain != config:
        raise WeightError(
            f"config.json cannot say what this decoder has beside a {kind.capitalize()}'s parts: {config}"
        )
    scaling = config.rope_scaling
    of_kind = {"sliding_window": config.sliding_window}
    if kind == "llama":
        fields = {} if scaling is None else dataclasses.asdict(scaling)
        fields = {"factor": fields["factor"]} if fields.get("kind") == "linear" else fields
        of_kind = {
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": None
            if scaling is None
            else {"rope_type": scaling.kind, **{k: v for k, v in fields.items() if k != "kind"}},
        }
    return {
        "model_type": kind,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        **of_kind,
    }


def read_rope_scaling(rope: dict[str, Any]) -> layers.RopeScaling | None:
    """Return the scaling of ``rope_scaling`` or ``rope_parameters``."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise WeightError(f"rope type {kind!r} is not supported; supported: default, linear, llama3")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return layers.RopeScaling(kind, **{name: rope[name] for name in names if name in rope})


def _window(kind: str, values: dict[str, Any]) -> int | None:
    if kind == "mistral":
        return values.get("sliding_window", 4096)
    if kind.startswith("qwen") and values.get("use_sliding_window"):
        raise WeightError("use_sliding_window=true, which windows some layers and not others, is not supported")
    return None


def canonical(name: str) -> str | None:
    """MiMo's layers for predicting several tokens at once are no part of the decoder, nor are stored frequencies."""
    return None if name.startswith("model.mtp_layers.") or name.endswith("rotary_emb.inv_freq") else name


BACKBONES = (Backbone(MODEL_TYPES, "decoder", transformer, canonical, read_config),)

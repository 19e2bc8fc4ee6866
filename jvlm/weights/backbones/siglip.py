"""SigLIP vision towers (``SiglipVisionModel``, and the vision half of ``SiglipModel``)."""

from __future__ import annotations

import re
from typing import Any

from jvlm.models.encoders.vit import ViTConfig
from jvlm.weights.backbones.vision import ViTNames, activation_of, grid_of, vit_backbone

NAMES = ViTNames(
    patch="embeddings.patch_embedding",
    position="embeddings.position_embedding.weight",
    layer="encoder.layers.{i}",
    norms=("layer_norm1", "layer_norm2"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
    after="post_layernorm",
)


def canonical(name: str) -> str | None:
    """Without the prefix; the text half, its scales and the pooling head are not part of the tower."""
    name = re.sub(r"^vision_model\.", "", name)
    if name.startswith(("text_model.", "head.", "logit_")) or name.endswith("position_ids"):
        return None
    return name


def read_config(values: dict[str, Any]) -> ViTConfig:
    """config.json of the tower or of the whole model."""
    values = values.get("vision_config") or values
    return ViTConfig(
        depth=values.get("num_hidden_layers", 12),
        hidden_size=values.get("hidden_size", 768),
        num_heads=values.get("num_attention_heads", 12),
        intermediate_size=values.get("intermediate_size", 3072),
        in_channels=values.get("num_channels", 3),
        patch_size=values.get("patch_size", 16),
        grid=grid_of(values, 224, 16),
        activation=activation_of(values, "gelu_pytorch_tanh"),
        norm_eps=values.get("layer_norm_eps", 1e-6),
    )


BACKBONES = (vit_backbone(("siglip", "siglip_vision_model"), NAMES, canonical, read_config),)

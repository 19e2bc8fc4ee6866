"""DINOv2 vision towers (``Dinov2Model``)."""

from __future__ import annotations

import re
from typing import Any

from jvlm.models.encoders.vit import ViTConfig
from jvlm.weights.backbones.vision import ViTNames, activation_of, grid_of, vit_backbone
from jvlm.weights.table import WeightError

NAMES = ViTNames(
    patch="embeddings.patch_embeddings.projection",
    position="embeddings.position_embeddings",
    position_pattern="1 n d -> n d",
    class_token="embeddings.cls_token",
    class_pattern="1 1 d -> d",
    layer="encoder.layer.{i}",
    norms=("norm1", "norm2"),
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    out="attention.output.dense",
    mlp=("mlp.fc1", "mlp.fc2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    after="layernorm",
)


def canonical(name: str) -> str | None:
    """Without the prefix; the token for masked training and a classifier are left out."""
    name = re.sub(r"^(dinov2|backbone)\.", "", name)
    return None if name == "embeddings.mask_token" or name.startswith(("classifier.", "head.")) else name


def read_config(values: dict[str, Any]) -> ViTConfig:
    """config.json of the tower."""
    if values.get("use_swiglu_ffn"):
        raise WeightError("use_swiglu_ffn=true (DINOv2 giant) is not supported; the small, base and large towers are")
    if not values.get("qkv_bias", True):
        raise WeightError("qkv_bias=false is not supported for DINOv2 towers")
    width = values.get("hidden_size", 768)
    return ViTConfig(
        depth=values.get("num_hidden_layers", 12),
        hidden_size=width,
        num_heads=values.get("num_attention_heads", 12),
        intermediate_size=values.get("mlp_ratio", 4) * width,
        in_channels=values.get("num_channels", 3),
        patch_size=values.get("patch_size", 14),
        grid=grid_of(values, 224, 14),
        activation=activation_of(values, "gelu"),
        norm_eps=values.get("layer_norm_eps", 1e-6),
        class_token=True,
        layer_scale=True,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
    )


BACKBONES = (vit_backbone(("dinov2",), NAMES, canonical, read_config),)

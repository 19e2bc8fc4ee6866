"""SigLIP vision towers (``SiglipVisionModel``, and the vision half of ``SiglipModel``)."""

from __future__ import annotations

import re
from typing import Any

from jvlm.models.encoders.vit import ViTConfig
from jvlm.weights.backbones.vision import CLIP_NAMES, ViTNames, clip_config, vit_backbone

NAMES = ViTNames(**CLIP_NAMES)


def canonical(name: str) -> str | None:
    """Without the prefix; the text half, its scales and the pooling head are not part of the tower."""
    name = re.sub(r"^vision_model\.", "", name)
    if name.startswith(("text_model.", "head.", "logit_")) or name.endswith("position_ids"):
        return None
    return name


def read_config(values: dict[str, Any]) -> ViTConfig:
    """config.json of the tower or of the whole model."""
    return clip_config(ViTConfig, values, patch_size=16, activation="gelu_pytorch_tanh", norm_eps=1e-6)


def write_config(config: ViTConfig) -> dict[str, Any]:
    """Return the inverse of `read_config`, but for the model_type."""
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": config.hidden_size,
        "image_size": config.grid * config.patch_size,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.norm_eps,
        "num_attention_heads": config.num_heads,
        "num_channels": config.in_channels,
        "num_hidden_layers": config.depth,
        "patch_size": config.patch_size,
    }


BACKBONES = (vit_backbone(("siglip", "siglip_vision_model"), NAMES, canonical, read_config),)

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


BACKBONES = (vit_backbone(("siglip", "siglip_vision_model"), NAMES, canonical, read_config),)

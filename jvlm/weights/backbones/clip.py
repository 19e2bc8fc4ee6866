"""CLIP vision towers (``CLIPVisionModel``, and the vision half of ``CLIPModel``)."""

from __future__ import annotations

import re
from typing import Any

from jvlm.models.encoders.vit import ViTConfig, clip_vit
from jvlm.weights.backbones.vision import CLIP_NAMES, ViTNames, clip_config, vit_backbone

# "layrn": so in every checkpoint
NAMES = ViTNames(**CLIP_NAMES, class_token="embeddings.class_embedding", before="pre_layrnorm")


def canonical(name: str) -> str | None:
    """Without the prefix; the text half, the projections and the norm of the pooled class token are left out."""
    name = re.sub(r"^vision_model\.", "", name)
    dropped = ("text_model.", "post_layernorm.", "logit_scale", "text_projection.", "visual_projection.")
    return None if name.startswith(dropped) or name.endswith("position_ids") else name


def read_config(values: dict[str, Any]) -> ViTConfig:
    """config.json of the tower or of the whole model."""
    return clip_config(clip_vit, values, patch_size=32, activation="quick_gelu", norm_eps=1e-5)


BACKBONES = (vit_backbone(("clip", "clip_vision_model"), NAMES, canonical, read_config),)

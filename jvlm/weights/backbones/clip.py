"""CLIP vision towers (``CLIPVisionModel``, and the vision half of ``CLIPModel``)."""

from __future__ import annotations

import re
from typing import Any

from jvlm.models.encoders.qwen_vit import CLIP_MEAN, CLIP_STD
from jvlm.models.encoders.vit import ViTConfig
from jvlm.weights.backbones.vision import ViTNames, activation_of, grid_of, vit_backbone

NAMES = ViTNames(
    patch="embeddings.patch_embedding",
    position="embeddings.position_embedding.weight",
    class_token="embeddings.class_embedding",
    before="pre_layrnorm",  # so in every checkpoint
    layer="encoder.layers.{i}",
    norms=("layer_norm1", "layer_norm2"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
    after="post_layernorm",
)


def canonical(name: str) -> str | None:
    """Without the prefix; the text half, the projections and the norm of the pooled class token are left out."""
    name = re.sub(r"^vision_model\.", "", name)
    dropped = ("text_model.", "post_layernorm.", "logit_scale", "text_projection.", "visual_projection.")
    return None if name.startswith(dropped) or name.endswith("position_ids") else name


def read_config(values: dict[str, Any]) -> ViTConfig:
    """config.json of the tower or of the whole model."""
    values = values.get("vision_config") or values
    return ViTConfig(
        depth=values.get("num_hidden_layers", 12),
        hidden_size=values.get("hidden_size", 768),
        num_heads=values.get("num_attention_heads", 12),
        intermediate_size=values.get("intermediate_size", 3072),
        in_channels=values.get("num_channels", 3),
        patch_size=values.get("patch_size", 32),
        grid=grid_of(values, 224, 32),
        activation=activation_of(values, "quick_gelu"),
        norm_eps=values.get("layer_norm_eps", 1e-5),
        patch_bias=False,
        class_token=True,
        norm_before=True,
        norm_after=False,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )


BACKBONES = (vit_backbone(("clip", "clip_vision_model"), NAMES, canonical, read_config),)

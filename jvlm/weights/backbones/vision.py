"""Rules that the packed ViT's families share: their checkpoints differ in names and in which parts they have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jvlm.models import layers
from jvlm.models.encoders.vit import ViTConfig
from jvlm.weights.backbones import Backbone
from jvlm.weights.rules import linear, norm
from jvlm.weights.table import Rule, WeightError

_ACTIVATIONS: dict[str, layers.Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


@dataclasses.dataclass(frozen=True)
class ViTNames:
    """What a family calls the parts of a ViT. ``layer`` contains ``{i}``; the names below it follow a layer.

    Attributes:
      positions: einops pattern of the position table, where it has more axes than [positions, channels].
    """

    patch: str
    position: str
    layer: str
    norms: tuple[str, str]
    qkv: tuple[str, str, str]
    out: str
    mlp: tuple[str, str]
    after: str
    before: str = ""
    class_token: str = ""
    class_pattern: str | None = None
    position_pattern: str | None = None
    scales: tuple[str, str] = ("", "")


# CLIP's names below a layer and of its embeddings, which SigLIP shares.
CLIP_NAMES = {
    "patch": "embeddings.patch_embedding",
    "position": "embeddings.position_embedding.weight",
    "layer": "encoder.layers.{i}",
    "norms": ("layer_norm1", "layer_norm2"),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": "self_attn.out_proj",
    "mlp": ("mlp.fc1", "mlp.fc2"),
    "after": "post_layernorm",
}


def clip_config(
    make: Callable[..., ViTConfig], values: dict[str, Any], *, patch_size: int, activation: str, norm_eps: float
) -> ViTConfig:
    """``make`` of the sizes under CLIP's keys, from config.json of the tower or of the whole model, or by default."""
    values = values.get("vision_config") or values
    return make(
        depth=values.get("num_hidden_layers", 12),
        hidden_size=values.get("hidden_size", 768),
        num_heads=values.get("num_attention_heads", 12),
        intermediate_size=values.get("intermediate_size", 3072),
        in_channels=values.get("num_channels", 3),
        patch_size=values.get("patch_size", patch_size),
        grid=grid_of(values, 224, patch_size),
        activation=activation_of(values, activation),
        norm_eps=values.get("layer_norm_eps", norm_eps),
    )


def vit_rules(config: ViTConfig, names: ViTNames, path: str) -> list[Rule]:
    """Return the table of a ViT whose parameters lie under ``path``."""
    layer, to = names.layer, f"{path}blocks.layer"
    rules = [
        Rule(f"{names.patch}.weight", f"{path}patch_embed.kernel", "d c y x -> (c y x) d"),
        Rule(names.position, f"{path}positions", names.position_pattern),
        *(r for n, name in enumerate(names.norms, 1) for r in norm(f"{layer}.{name}", f"{to}.norm{n}", bias=True)),
        *(
            r
            for part, name in zip("qkv", names.qkv, strict=True)
            for r in linear(f"{layer}.{name}", f"{to}.attention.{part}", bias=True)
        ),
        *linear(f"{layer}.{names.out}", f"{to}.attention.out", bias=True),
        *linear(f"{layer}.{names.mlp[0]}", f"{to}.mlp.up", bias=True),
        *linear(f"{layer}.{names.mlp[1]}", f"{to}.mlp.down", bias=True),
    ]
    if config.patch_bias:
        rules.append(Rule(f"{names.patch}.bias", f"{path}patch_embed.bias"))
    if config.class_token:
        rules.append(Rule(names.class_token, f"{path}class_token", names.class_pattern))
    if config.norm_before:
        rules += norm(names.before, f"{path}norm_before", bias=True)
    if config.layer_scale:
        rules += [Rule(f"{layer}.{name}", f"{to}.scale{n}") for n, name in enumerate(names.scales, 1)]
    if config.norm_after:
        rules += norm(names.after, f"{path}norm_after", bias=True)
    return rules


def vit_sizes(config: ViTConfig) -> dict[str, int]:
    """Axis lengths for the patterns of `vit_rules`."""
    return {"c": config.in_channels, "y": config.patch_size, "x": config.patch_size}


def grid_of(values: dict[str, Any], image_size: int, patch_size: int) -> int:
    """Places of the position table along a side, from config.json and the family's default sizes in pixels."""
    side = values.get("image_size", image_size)
    if not isinstance(side, int):
        raise WeightError(f"image_size {side} is not supported; position tables are square")
    return side // values.get("patch_size", patch_size)


def activation_of(values: dict[str, Any], default: str) -> layers.Activation:
    """Return the activation that ``hidden_act`` names."""
    name = values.get("hidden_act", default)
    if name not in _ACTIVATIONS:
        raise WeightError(f"hidden_act {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def vit_backbone(
    model_types: tuple[str, ...],
    names: ViTNames,
    canonical: Callable[[str], str | None],
    read_config: Callable[[dict[str, Any]], ViTConfig],
) -> Backbone:
    """Return the entry of a family."""
    return Backbone(
        model_types, "encoder", lambda c: vit_rules(c, names, "encoder."), canonical, read_config, vit_sizes
    )

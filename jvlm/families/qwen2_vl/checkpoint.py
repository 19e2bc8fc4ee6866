"""Checkpoints of Qwen2-VL (``Qwen2VLForConditionalGeneration``): config.json and tensor names."""

from __future__ import annotations

from typing import Any

from jvlm.families import qwen
from jvlm.families.base import HFFormat
from jvlm.families.qwen2_5_vl import processor_files
from jvlm.families.qwen2_vl.image_processor import Qwen2ImageConfig
from jvlm.families.qwen2_vl.vision import Qwen2ViTConfig
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.vlm import VLMConfig
from jvlm.weights.rules import linear, norm, transformer
from jvlm.weights.table import Rule, WeightError


def rules(config: VLMConfig) -> tuple[Rule, ...]:
    """Return the table of tensor names."""
    vit, to_vit = "visual.blocks.{i}", "encoder.blocks.layer"
    return (
        qwen.patches("visual"),
        *norm(f"{vit}.norm1", f"{to_vit}.norm1", bias=True),
        *norm(f"{vit}.norm2", f"{to_vit}.norm2", bias=True),
        *qwen.attention(f"{vit}.attn", f"{to_vit}.attention"),
        *linear(f"{vit}.mlp.fc1", f"{to_vit}.mlp.up", bias=True),
        *linear(f"{vit}.mlp.fc2", f"{to_vit}.mlp.down", bias=True),
        *norm("visual.merger.ln_q", "connector.norm", bias=True),
        *linear("visual.merger.mlp.0", "connector.hidden", bias=True),
        *linear("visual.merger.mlp.2", "connector.out", bias=True),
        *transformer(config.decoder),
    )


def read_config(values: dict[str, Any]) -> VLMConfig:
    """Return the configuration of a config.json of any age. Missing keys get the values of transformers' classes."""
    decoder = qwen.flat_decoder(values, eps=1e-5, positions=32768)
    vision = values.get("vision_config") or {}
    qwen.check({"vision_config: hidden_act": (vision.get("hidden_act", "quick_gelu"), "quick_gelu")})
    qwen.check_width(vision, "hidden_size", {"hidden_size": decoder.hidden_size})
    width, ratio = vision.get("embed_dim", 1280), vision.get("mlp_ratio", 4)
    if int(width * ratio) != width * ratio:
        raise WeightError(f"vision_config.mlp_ratio {ratio} of embed_dim {width} gives no whole width of the MLPs")
    sizes = {"hidden_size": width, "intermediate_size": int(width * ratio)}
    encoder = Qwen2ViTConfig(**qwen.vision_sizes({**vision, **sizes}, Qwen2ViTConfig()))
    return VLMConfig(
        family="qwen2_vl",
        encoder=encoder,
        connector=PatchMergerConfig(merge=encoder.spatial_merge_size, norm="layer"),
        decoder=decoder,
        **qwen.flat_token_ids(values),
    )


def write_config(config: VLMConfig) -> dict[str, Any]:
    """Return the flat form of the released checkpoints."""
    vit = config.encoder
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **qwen.written_flat(config),
        "vision_config": {
            **qwen.written_vision(vit),
            "model_type": "qwen2_vl",
            "embed_dim": vit.hidden_size,
            "hidden_act": "quick_gelu",
            "hidden_size": config.decoder.hidden_size,
            "in_chans": vit.in_channels,
            "mlp_ratio": vit.intermediate_size // vit.hidden_size,
            "spatial_patch_size": vit.patch_size,
        },
    }


def unsupported(config: VLMConfig) -> str | None:
    """Return what no config.json of the family can say."""
    vit = config.encoder
    if vit.intermediate_size % vit.hidden_size:
        return "MLPs in the vision tower whose width is no multiple of the tower's"
    return None


HF = HFFormat(
    model_types=("qwen2_vl",),
    read_config=read_config,
    write_config=write_config,
    rules=rules,
    axis_sizes=qwen.axis_sizes,
    canonical=qwen.canonical,
    layouts=qwen.LAYOUTS,
    pixels=processor_files.PIXELS,
    read_image_config=processor_files.reader(Qwen2ImageConfig),
    write_image_config=processor_files.writer("Qwen2VLProcessor"),
    unsupported=unsupported,
    tokenizer_classes=qwen.TOKENIZER_CLASSES,
)

"""Checkpoints of Qwen2.5-VL and MiMo-VL (``Qwen2_5_VLForConditionalGeneration``): config.json and tensor names."""

from __future__ import annotations

from typing import Any

from jvlm.families import qwen
from jvlm.families.base import HFFormat
from jvlm.families.qwen2_5_vl import processor_files
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.encoders.qwen_vit import QwenViTConfig
from jvlm.models.vlm import VLMConfig
from jvlm.weights.rules import linear, norm, swiglu, transformer
from jvlm.weights.table import Rule


def rules(config: VLMConfig) -> tuple[Rule, ...]:
    """Return the table of tensor names."""
    vit, to_vit = "visual.blocks.{i}", "encoder.blocks.layer"
    return (
        qwen.patches("visual"),
        *norm(f"{vit}.norm1", f"{to_vit}.norm1"),
        *norm(f"{vit}.norm2", f"{to_vit}.norm2"),
        *qwen.attention(f"{vit}.attn", f"{to_vit}.attention"),
        *swiglu(f"{vit}.mlp", f"{to_vit}.mlp", bias=True),
        *norm("visual.merger.ln_q", "connector.norm"),
        *linear("visual.merger.mlp.0", "connector.hidden", bias=True),
        *linear("visual.merger.mlp.2", "connector.out", bias=True),
        *transformer(config.decoder),
    )


def read_config(values: dict[str, Any]) -> VLMConfig:
    """Return the configuration of a config.json of any age. Missing keys get the published values."""
    decoder = qwen.flat_decoder(values)
    vision, default = values.get("vision_config") or {}, QwenViTConfig()
    qwen.check({"vision_config: hidden_act": (vision.get("hidden_act", "silu"), "silu")})
    qwen.check_width(vision, "out_hidden_size", {"hidden_size": decoder.hidden_size})
    sizes = qwen.vision_sizes(vision, default)
    whole = [i for i in default.fullatt_block_indexes if i < sizes["depth"]]
    encoder = QwenViTConfig(
        **sizes,
        window_size=vision.get("window_size", default.window_size),
        fullatt_block_indexes=tuple(vision.get("fullatt_block_indexes", whole)),
        tokens_per_second=vision.get("tokens_per_second", default.tokens_per_second),
    )
    return VLMConfig(
        family="qwen2_5_vl",
        encoder=encoder,
        connector=PatchMergerConfig(merge=encoder.spatial_merge_size),
        decoder=decoder,
        **qwen.flat_token_ids(values),
    )


def write_config(config: VLMConfig) -> dict[str, Any]:
    """Return the flat form of the released checkpoints: read by transformers 4.49 and everything after it."""
    vit = config.encoder
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **qwen.written_flat(config),
        "vision_config": {
            **qwen.written_vision(vit),
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "hidden_size": vit.hidden_size,
            "intermediate_size": vit.intermediate_size,
            "in_chans": vit.in_channels,
            "out_hidden_size": config.decoder.hidden_size,
            "spatial_patch_size": vit.patch_size,
            "window_size": vit.window_size,
            "fullatt_block_indexes": list(vit.fullatt_block_indexes),
            "tokens_per_second": vit.tokens_per_second,
        },
    }


HF = HFFormat(
    model_types=("qwen2_5_vl",),
    read_config=read_config,
    write_config=write_config,
    rules=rules,
    axis_sizes=qwen.axis_sizes,
    canonical=qwen.canonical,
    layouts=qwen.LAYOUTS,
    pixels=processor_files.PIXELS,
    read_image_config=processor_files.reader(processor_files.QwenImageConfig),
    write_image_config=processor_files.writer("Qwen2_5_VLProcessor"),
    tokenizer_classes=qwen.TOKENIZER_CLASSES,
)

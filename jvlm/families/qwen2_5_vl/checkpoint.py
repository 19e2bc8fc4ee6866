"""Checkpoints of Qwen2.5-VL and MiMo-VL (``Qwen2_5_VLForConditionalGeneration``): config.json and tensor names."""

from __future__ import annotations

import re
from typing import Any

from jvlm.families.base import HFFormat
from jvlm.families.qwen2_5_vl import processor_files
from jvlm.families.qwen2_5_vl.presets import TOKEN_IDS
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.qwen_vit import QwenViTConfig
from jvlm.models.token_ids import end_token_id
from jvlm.models.vlm import VLMConfig
from jvlm.weights.rules import linear, norm, swiglu, transformer
from jvlm.weights.table import Rule, WeightError


def rules(config: VLMConfig) -> tuple[Rule, ...]:
    """Return the table of tensor names."""
    vit, to_vit = "visual.blocks.{i}", "encoder.blocks.layer"
    return (
        Rule("visual.patch_embed.proj.weight", "encoder.patch_embed.kernel", "d c t y x -> (c t y x) d"),
        *norm(f"{vit}.norm1", f"{to_vit}.norm1"),
        *norm(f"{vit}.norm2", f"{to_vit}.norm2"),
        Rule(f"{vit}.attn.qkv.weight", f"{to_vit}.attention.qkv_by_head.kernel", "(qkv h k) i -> i (h qkv k)"),
        Rule(f"{vit}.attn.qkv.bias", f"{to_vit}.attention.qkv_by_head.bias", "(qkv h k) -> (h qkv k)"),
        *linear(f"{vit}.attn.proj", f"{to_vit}.attention.out", bias=True),
        *swiglu(f"{vit}.mlp", f"{to_vit}.mlp", bias=True),
        *norm("visual.merger.ln_q", "connector.norm"),
        *linear("visual.merger.mlp.0", "connector.hidden", bias=True),
        *linear("visual.merger.mlp.2", "connector.out", bias=True),
        *transformer(config.decoder),
    )


def axis_sizes(config: VLMConfig) -> dict[str, int]:
    """Return the lengths of the axes that the rules take apart."""
    vit = config.encoder
    patch = {"c": vit.in_channels, "t": vit.temporal_patch_size, "y": vit.patch_size, "x": vit.patch_size}
    return {**patch, "qkv": 3, "h": vit.num_heads, "k": vit.head_dim}


def canonical(name: str) -> str | None:
    """Return the older one of the two published names, which every released checkpoint uses."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def new_layout(name: str) -> str:
    """Return the name that transformers >= 4.52 uses in memory."""
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?!visual\.)", "model.language_model.", name)


def read_config(values: dict[str, Any]) -> VLMConfig:
    """Return the configuration of a config.json of any age, flat or with ``text_config``.

    Missing keys get the published values.
    """
    text = {**values, **(values.get("text_config") or {})}
    vision = values.get("vision_config") or {}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise WeightError(f"rope type {kind!r} is not supported; supported: default, mrope")
    if text.get("use_sliding_window"):
        raise WeightError("use_sliding_window=true is not supported by this architecture's decoder")
    for owner, part in (("config", text), ("vision_config", vision)):
        if part.get("hidden_act", "silu") != "silu":
            raise WeightError(f"{owner}: hidden_act {part['hidden_act']!r} is not supported; supported: silu")
    heads = text["num_attention_heads"]
    half_head = text["hidden_size"] // heads // 2
    default = QwenViTConfig()
    depth = vision.get("depth", default.depth)
    encoder = QwenViTConfig(
        depth=depth,
        hidden_size=vision.get("hidden_size", default.hidden_size),
        num_heads=vision.get("num_heads", default.num_heads),
        intermediate_size=vision.get("intermediate_size", default.intermediate_size),
        in_channels=vision.get("in_channels", vision.get("in_chans", default.in_channels)),
        patch_size=vision.get("patch_size", vision.get("spatial_patch_size", default.patch_size)),
        temporal_patch_size=vision.get("temporal_patch_size", default.temporal_patch_size),
        spatial_merge_size=vision.get("spatial_merge_size", default.spatial_merge_size),
        window_size=vision.get("window_size", default.window_size),
        fullatt_block_indexes=tuple(
            vision.get("fullatt_block_indexes", [i for i in default.fullatt_block_indexes if i < depth])
        ),
        tokens_per_second=vision.get("tokens_per_second", default.tokens_per_second),
    )
    if vision.get("out_hidden_size", text["hidden_size"]) != text["hidden_size"]:
        raise WeightError(
            f"vision_config.out_hidden_size {vision['out_hidden_size']} must equal hidden_size {text['hidden_size']}"
        )
    decoder = TransformerConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        intermediate_size=text["intermediate_size"],
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
        mrope_section=tuple(rope.get("mrope_section") or _default_section(half_head)),
        # before transformers 5 the nested configuration alone may say so
        tie_word_embeddings=bool(values.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        max_position_embeddings=text.get("max_position_embeddings", 128000),
    )
    ids = {k: v for part in (text, values) for k, v in part.items() if v is not None}
    start = ids.get("vision_start_token_id", TOKEN_IDS["vision_start_token_id"])
    return VLMConfig(
        family="qwen2_5_vl",
        encoder=encoder,
        connector=PatchMergerConfig(merge=encoder.spatial_merge_size),
        decoder=decoder,
        image_token_id=ids.get("image_token_id", TOKEN_IDS["image_token_id"]),
        video_token_id=ids.get("video_token_id", TOKEN_IDS["video_token_id"]),
        vision_start_token_id=start,
        vision_end_token_id=ids.get("vision_end_token_id", start + 1),
        vision_pad_token_id=ids.get("vision_token_id", ids.get("vision_end_token_id", start + 1) + 1),
        bos_token_id=ids.get("bos_token_id"),
        eos_token_id=end_token_id(values, {**TOKEN_IDS, **(values.get("text_config") or values)}),
    )


def _default_section(half: int) -> tuple[int, int, int]:
    if half == 64:
        return (16, 24, 24)
    raise WeightError(f"mrope_section is missing and has no default for heads of {2 * half}")


def write_config(config: VLMConfig) -> dict[str, Any]:
    """Return the flat form of the released checkpoints: read by transformers 4.49 and everything after it."""
    vit, llm = config.encoder, config.decoder
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "vision_token_id": config.vision_pad_token_id,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "initializer_range": config.precision.initializer_range or 0.02,
        "intermediate_size": llm.intermediate_size,
        "max_position_embeddings": llm.max_position_embeddings,
        "max_window_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_hidden_layers": llm.num_layers,
        "num_key_value_heads": llm.num_kv_heads,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_theta": llm.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(llm.mrope_section)},
        "sliding_window": 32768,
        "tie_word_embeddings": llm.tie_word_embeddings,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": llm.vocab_size,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": vit.depth,
            "hidden_act": "silu",
            "hidden_size": vit.hidden_size,
            "intermediate_size": vit.intermediate_size,
            "num_heads": vit.num_heads,
            "in_channels": vit.in_channels,
            "in_chans": vit.in_channels,
            "out_hidden_size": llm.hidden_size,
            "patch_size": vit.patch_size,
            "spatial_patch_size": vit.patch_size,
            "spatial_merge_size": vit.spatial_merge_size,
            "temporal_patch_size": vit.temporal_patch_size,
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
    axis_sizes=axis_sizes,
    canonical=canonical,
    layouts={"released": lambda name: name, "transformers": new_layout},
    pixels=processor_files.PIXELS,
    read_image_config=processor_files.read_image_config,
    write_image_config=processor_files.write_image_config,
    # the processor of transformers 4 takes no tokenizer of another class
    tokenizer_classes=("Qwen2Tokenizer",),
)

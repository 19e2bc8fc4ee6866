"""Checkpoints of Qwen3-VL (``Qwen3VL[Moe]ForConditionalGeneration``): config.json and tensor names."""

from __future__ import annotations

import re
from typing import Any

from jvlm.families.base import HFFormat
from jvlm.families.qwen3_vl import processor_files
from jvlm.families.qwen3_vl.presets import BALANCE_WEIGHT, TOKEN_IDS
from jvlm.families.qwen3_vl.vision import DeepStackMergerConfig, Qwen3ViTConfig
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.token_ids import end_token_id
from jvlm.models.vlm import VLMConfig
from jvlm.weights.rules import linear, norm, transformer
from jvlm.weights.table import Rule, WeightError

DENSE, EXPERTS = "qwen3_vl", "qwen3_vl_moe"
_VISION, _TEXT = "model.visual", "model.language_model"


def rules(config: VLMConfig) -> tuple[Rule, ...]:
    """Return the table of tensor names."""
    vit, to_vit = f"{_VISION}.blocks.{{i}}", "encoder.blocks.layer"
    return (
        Rule(f"{_VISION}.patch_embed.proj.weight", "encoder.patch_embed.kernel", "d c t y x -> (c t y x) d"),
        Rule(f"{_VISION}.patch_embed.proj.bias", "encoder.patch_embed.bias"),
        Rule(f"{_VISION}.pos_embed.weight", "encoder.positions"),
        *norm(f"{vit}.norm1", f"{to_vit}.norm1", bias=True),
        *norm(f"{vit}.norm2", f"{to_vit}.norm2", bias=True),
        Rule(f"{vit}.attn.qkv.weight", f"{to_vit}.attention.qkv_by_head.kernel", "(qkv h k) i -> i (h qkv k)"),
        Rule(f"{vit}.attn.qkv.bias", f"{to_vit}.attention.qkv_by_head.bias", "(qkv h k) -> (h qkv k)"),
        *linear(f"{vit}.attn.proj", f"{to_vit}.attention.out", bias=True),
        *linear(f"{vit}.mlp.linear_fc1", f"{to_vit}.mlp.up", bias=True),
        *linear(f"{vit}.mlp.linear_fc2", f"{to_vit}.mlp.down", bias=True),
        *_merger(f"{_VISION}.merger", "connector.merger"),
        *_merger(f"{_VISION}.deepstack_merger_list.{{i}}", "connector.deepstack.layer"),
        *transformer(config.decoder, _TEXT),
        *(_experts() if config.decoder.mlp else ()),
    )


def _merger(name: str, path: str) -> list[Rule]:
    return [
        *norm(f"{name}.norm", f"{path}.norm", bias=True),
        *linear(f"{name}.linear_fc1", f"{path}.hidden", bias=True),
        *linear(f"{name}.linear_fc2", f"{path}.out", bias=True),
    ]


def _experts() -> list[Rule]:
    name, path = f"{_TEXT}.layers.{{i}}.mlp", "decoder.blocks.layer.mlp"
    parts = ("gate", "up", "down")
    return [
        Rule(f"{name}.gate.weight", f"{path}.router", "e d -> d e"),
        *(Rule(f"{name}.experts.{part}_proj", f"{path}.{part}") for part in parts),
    ]


def axis_sizes(config: VLMConfig) -> dict[str, int]:
    """Return the lengths of the axes that the rules take apart."""
    vit = config.encoder
    patch = {"c": vit.in_channels, "t": vit.temporal_patch_size, "y": vit.patch_size, "x": vit.patch_size}
    return {**patch, "qkv": 3, "h": vit.num_heads, "k": vit.head_dim}


def canonical(name: str) -> str | None:
    """Return the published name; the buffers of rotary embeddings are no parameters."""
    return None if re.search(r"rotary\w*\.(\w+_)?inv_freq$", name) else name


def read_config(values: dict[str, Any]) -> VLMConfig:
    """Return the configuration of a config.json. Missing keys get the values of transformers' classes."""
    text, vision = values.get("text_config") or {}, values.get("vision_config") or {}
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    _check(text, vision, rope)
    has_experts = values.get("model_type") == EXPERTS
    default = Qwen3ViTConfig()
    depth = vision.get("depth", default.depth)
    table = vision.get("num_position_embeddings", default.position_grid**2)
    grid = round(table**0.5)
    if grid**2 != table:
        raise WeightError(f"vision_config.num_position_embeddings {table} is not the square of a whole number")
    encoder = Qwen3ViTConfig(
        depth=depth,
        hidden_size=vision.get("hidden_size", default.hidden_size),
        num_heads=vision.get("num_heads", default.num_heads),
        intermediate_size=vision.get("intermediate_size", default.intermediate_size),
        in_channels=vision.get("in_channels", default.in_channels),
        patch_size=vision.get("patch_size", default.patch_size),
        temporal_patch_size=vision.get("temporal_patch_size", default.temporal_patch_size),
        spatial_merge_size=vision.get("spatial_merge_size", default.spatial_merge_size),
        position_grid=grid,
        deepstack_layers=tuple(vision.get("deepstack_visual_indexes", default.deepstack_layers)),
    )
    if vision.get("out_hidden_size", text["hidden_size"]) != text["hidden_size"]:
        raise WeightError(
            f"vision_config.out_hidden_size {vision['out_hidden_size']} must equal hidden_size {text['hidden_size']}"
        )
    heads = text["num_attention_heads"]
    # 128 is the default of the dense models alone
    head_dim = text.get("head_dim") or (text["hidden_size"] // heads if has_experts else 128)
    decoder = TransformerConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate_size=text["intermediate_size"],
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        qkv_bias=False,
        qk_norm=True,
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 5e5))),
        mrope_section=tuple(rope.get("mrope_section", (24, 20, 20))),
        mrope_interleaved=True,
        mlp=_read_experts(text) if has_experts else None,
        # before transformers 5 the nested configuration alone may say so
        tie_word_embeddings=bool(values.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        max_position_embeddings=text.get("max_position_embeddings", 128000),
    )
    ids = {k: v for part in (text, values) for k, v in part.items() if v is not None}
    return VLMConfig(
        family="qwen3_vl",
        encoder=encoder,
        connector=DeepStackMergerConfig(merge=encoder.spatial_merge_size, levels=len(encoder.deepstack_layers)),
        decoder=decoder,
        **{
            name: ids.get(name, TOKEN_IDS[name])
            for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        },
        # no config.json has it: it follows the end of an image in every tokenizer
        vision_pad_token_id=ids.get("vision_end_token_id", TOKEN_IDS["vision_end_token_id"]) + 1,
        bos_token_id=ids.get("bos_token_id"),
        eos_token_id=end_token_id(values, {**TOKEN_IDS, **text}),
    )


def _check(text: dict[str, Any], vision: dict[str, Any], rope: dict[str, Any]) -> None:
    """Raise WeightError for what these models do not have here."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    expected = {
        "text_config: rope type": (kind, "default"),
        "text_config: mrope_interleaved": (rope.get("mrope_interleaved", True), True),
        "text_config: attention_bias": (text.get("attention_bias", False), False),
        "text_config: hidden_act": (text.get("hidden_act", "silu"), "silu"),
        "text_config: decoder_sparse_step": (text.get("decoder_sparse_step", 1), 1),
        "text_config: mlp_only_layers": (text.get("mlp_only_layers") or [], []),
        "text_config: norm_topk_prob": (text.get("norm_topk_prob", True), True),
        "vision_config: hidden_act": (vision.get("hidden_act", "gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
    }
    for name, (value, supported) in expected.items():
        if value != supported:
            raise WeightError(f"{name} {value!r} is not supported; supported: {supported!r}")


def _read_experts(text: dict[str, Any]) -> MoEConfig:
    return MoEConfig(
        every=1,
        experts=text.get("num_experts", text.get("num_local_experts", 60)),
        top_k=text.get("num_experts_per_tok", 4),
        intermediate_size=text.get("moe_intermediate_size", 1408),
        balance_weight=text.get("router_aux_loss_coef", BALANCE_WEIGHT),
        z_weight=0.0,
    )


def write_config(config: VLMConfig) -> dict[str, Any]:
    """Return the nested form of the released checkpoints, which transformers >= 4.57 reads."""
    vit, llm = config.encoder, config.decoder
    kind = DENSE if llm.mlp is None else EXPERTS
    spread = config.precision.initializer_range or 0.02
    text = {
        "model_type": f"{kind}_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "head_dim": llm.head_size,
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "initializer_range": spread,
        "intermediate_size": llm.intermediate_size,
        "max_position_embeddings": llm.max_position_embeddings,
        "num_attention_heads": llm.num_heads,
        "num_hidden_layers": llm.num_layers,
        "num_key_value_heads": llm.num_kv_heads,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": list(llm.mrope_section),
            "rope_type": "default",
        },
        "rope_theta": llm.rope_theta,
        "tie_word_embeddings": llm.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": llm.vocab_size,
        **(_written_experts(llm.mlp) if llm.mlp else {}),
    }
    vision = {
        "model_type": kind,
        "deepstack_visual_indexes": list(vit.deepstack_layers),
        "depth": vit.depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vit.hidden_size,
        "in_channels": vit.in_channels,
        "initializer_range": spread,
        "intermediate_size": vit.intermediate_size,
        "num_heads": vit.num_heads,
        "num_position_embeddings": vit.position_grid**2,
        "out_hidden_size": llm.hidden_size,
        "patch_size": vit.patch_size,
        "spatial_merge_size": vit.spatial_merge_size,
        "temporal_patch_size": vit.temporal_patch_size,
    }
    name = "Qwen3VL" if llm.mlp is None else "Qwen3VLMoe"
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "tie_word_embeddings": llm.tie_word_embeddings,
        "text_config": text,
        "vision_config": vision,
    }


def _written_experts(experts: MoEConfig) -> dict[str, Any]:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": True,
        "num_experts": experts.experts,
        "num_experts_per_tok": experts.top_k,
        "router_aux_loss_coef": experts.balance_weight,
    }


def unsupported(config: VLMConfig) -> str | None:
    """Return what no public checkpoint of the family has."""
    llm = config.decoder
    if not llm.mrope_interleaved or not llm.qk_norm or llm.qkv_bias:
        return "a decoder of another kind than Qwen3-VL's"
    if llm.mlp is not None and (not isinstance(llm.mlp, MoEConfig) or llm.mlp.every != 1 or not llm.mlp.renormalise):
        return "experts that are not in every layer, or whose weights do not add up to 1"
    return None


HF = HFFormat(
    model_types=(DENSE, EXPERTS),
    read_config=read_config,
    write_config=write_config,
    rules=rules,
    axis_sizes=axis_sizes,
    canonical=canonical,
    layouts={"released": lambda name: name, "transformers": lambda name: name},
    pixels=processor_files.PIXELS,
    read_image_config=processor_files.read_image_config,
    write_image_config=processor_files.write_image_config,
    unsupported=unsupported,
    # the processor of transformers 4 takes no tokenizer of another class
    tokenizer_classes=("Qwen2Tokenizer",),
    fused={"experts.gate_up_proj": ("experts.gate_proj", "experts.up_proj")},
)

"""Checkpoints of Qwen3-VL (``Qwen3VL[Moe]ForConditionalGeneration``): config.json and tensor names."""

from __future__ import annotations

import re
from typing import Any

from jvlm.families import qwen
from jvlm.families.base import HFFormat
from jvlm.families.qwen3_vl import processor_files
from jvlm.families.qwen3_vl.presets import BALANCE_WEIGHT
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
        qwen.patches(_VISION),
        Rule(f"{_VISION}.patch_embed.proj.bias", "encoder.patch_embed.bias"),
        Rule(f"{_VISION}.pos_embed.weight", "encoder.positions"),
        *norm(f"{vit}.norm1", f"{to_vit}.norm1", bias=True),
        *norm(f"{vit}.norm2", f"{to_vit}.norm2", bias=True),
        *qwen.attention(f"{vit}.attn", f"{to_vit}.attention"),
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
    table = vision.get("num_position_embeddings", default.position_grid**2)
    grid = round(table**0.5)
    if grid**2 != table:
        raise WeightError(f"vision_config.num_position_embeddings {table} is not the square of a whole number")
    encoder = Qwen3ViTConfig(
        **qwen.vision_sizes(vision, default),
        position_grid=grid,
        deepstack_layers=tuple(vision.get("deepstack_visual_indexes", default.deepstack_layers)),
    )
    qwen.check_width(vision, "out_hidden_size", text)
    # 128 is the default of the dense models alone
    head_dim = text.get("head_dim") or (text["hidden_size"] // text["num_attention_heads"] if has_experts else 128)
    decoder = TransformerConfig(
        **qwen.decoder_sizes(values, text, eps=1e-6, positions=128000),
        head_dim=head_dim,
        qkv_bias=False,
        qk_norm=True,
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 5e5))),
        mrope_section=tuple(rope.get("mrope_section", (24, 20, 20))),
        mrope_interleaved=True,
        mlp=_read_experts(text) if has_experts else None,
    )
    ids = {k: v for part in (text, values) for k, v in part.items() if v is not None}
    return VLMConfig(
        family="qwen3_vl",
        encoder=encoder,
        connector=DeepStackMergerConfig(merge=encoder.spatial_merge_size, levels=len(encoder.deepstack_layers)),
        decoder=decoder,
        **{
            name: ids.get(name, qwen.TOKEN_IDS[name])
            for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        },
        # no config.json has it: it follows the end of an image in every tokenizer
        vision_pad_token_id=ids.get("vision_end_token_id", qwen.TOKEN_IDS["vision_end_token_id"]) + 1,
        bos_token_id=ids.get("bos_token_id"),
        eos_token_id=end_token_id(values, {**qwen.TOKEN_IDS, **text}),
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
    qwen.check(expected)


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
        **qwen.written_sizes(llm),
        "model_type": f"{kind}_text",
        "attention_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "head_dim": llm.head_size,
        "initializer_range": spread,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": list(llm.mrope_section),
            "rope_type": "default",
        },
        **(_written_experts(llm.mlp) if llm.mlp else {}),
    }
    vision = {
        **qwen.written_vision(vit),
        "model_type": kind,
        "deepstack_visual_indexes": list(vit.deepstack_layers),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vit.hidden_size,
        "initializer_range": spread,
        "intermediate_size": vit.intermediate_size,
        "num_position_embeddings": vit.position_grid**2,
        "out_hidden_size": llm.hidden_size,
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
    axis_sizes=qwen.axis_sizes,
    canonical=canonical,
    layouts={"released": lambda name: name, "transformers": lambda name: name},
    pixels=processor_files.PIXELS,
    read_image_config=processor_files.read_image_config,
    write_image_config=processor_files.write_image_config,
    unsupported=unsupported,
    tokenizer_classes=qwen.TOKENIZER_CLASSES,
    fused={"experts.gate_up_proj": ("experts.gate_proj", "experts.up_proj")},
)

"""Published sizes of Qwen3-VL, from their configuration files. Instruct and Thinking models have the same."""

from __future__ import annotations

from typing import Any

from jvlm.families.qwen import TOKEN_IDS
from jvlm.families.qwen3_vl.vision import DeepStackMergerConfig, Qwen3ViTConfig
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.vlm import VLMConfig

SMALL_VIT = Qwen3ViTConfig(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_layers=(5, 11, 17))
# The models were trained with the router's balance loss alone.
BALANCE_WEIGHT = 0.001


def _model(encoder: Qwen3ViTConfig, **decoder: Any) -> VLMConfig:
    same = {
        "vocab_size": 151936,
        "num_kv_heads": 8,
        "head_dim": 128,
        "qkv_bias": False,
        "qk_norm": True,
        "rope_theta": 5e6,
        "mrope_section": (24, 20, 20),
        "mrope_interleaved": True,
        "max_position_embeddings": 262144,
    }
    return VLMConfig(
        family="qwen3_vl",
        encoder=encoder,
        connector=DeepStackMergerConfig(),
        decoder=TransformerConfig(**{**same, **decoder}),
        **TOKEN_IDS,
    )


def _experts(width: int) -> MoEConfig:
    return MoEConfig(
        every=1, experts=128, top_k=8, intermediate_size=width, balance_weight=BALANCE_WEIGHT, z_weight=0.0
    )


PRESETS: dict[str, VLMConfig] = {
    "qwen3_vl_2b": _model(
        SMALL_VIT, hidden_size=2048, num_layers=28, num_heads=16, intermediate_size=6144, tie_word_embeddings=True
    ),
    "qwen3_vl_4b": _model(
        SMALL_VIT, hidden_size=2560, num_layers=36, num_heads=32, intermediate_size=9728, tie_word_embeddings=True
    ),
    "qwen3_vl_8b": _model(Qwen3ViTConfig(), hidden_size=4096, num_layers=36, num_heads=32, intermediate_size=12288),
    "qwen3_vl_32b": _model(Qwen3ViTConfig(), hidden_size=5120, num_layers=64, num_heads=64, intermediate_size=25600),
    "qwen3_vl_30b_a3b": _model(
        Qwen3ViTConfig(),
        hidden_size=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        intermediate_size=6144,
        mlp=_experts(768),
    ),
    "qwen3_vl_235b_a22b": _model(
        Qwen3ViTConfig(),
        hidden_size=4096,
        num_layers=94,
        num_heads=64,
        num_kv_heads=4,
        intermediate_size=12288,
        mlp=_experts(1536),
    ),
}

"""Published sizes of Qwen2-VL, from their configuration files. Base and Instruct models have the same."""

from __future__ import annotations

from typing import Any

from jvlm.families.qwen import TOKEN_IDS
from jvlm.families.qwen2_vl.vision import Qwen2ViTConfig
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.vlm import VLMConfig


def _model(**decoder: Any) -> VLMConfig:
    return VLMConfig(
        family="qwen2_vl",
        encoder=Qwen2ViTConfig(),
        connector=PatchMergerConfig(norm="layer"),
        decoder=TransformerConfig(mrope_section=(16, 24, 24), max_position_embeddings=32768, **decoder),
        **TOKEN_IDS,
    )


PRESETS: dict[str, VLMConfig] = {
    "qwen2_vl_2b": _model(
        vocab_size=151936,
        hidden_size=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        intermediate_size=8960,
        tie_word_embeddings=True,
    ),
    "qwen2_vl_7b": _model(
        vocab_size=152064, hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, intermediate_size=18944
    ),
    "qwen2_vl_72b": _model(
        vocab_size=152064, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, intermediate_size=29568
    ),
}

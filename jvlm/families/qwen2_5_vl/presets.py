"""Published sizes of Qwen2.5-VL and MiMo-VL, from their reports and configuration files."""

from __future__ import annotations

from jvlm.families.qwen import TOKEN_IDS
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.qwen_vit import QwenViTConfig
from jvlm.models.vlm import VLMConfig


def _model(vit_width: int, **decoder) -> VLMConfig:
    return VLMConfig(
        family="qwen2_5_vl",
        encoder=QwenViTConfig(intermediate_size=vit_width),
        connector=PatchMergerConfig(),
        decoder=TransformerConfig(mrope_section=(16, 24, 24), **decoder),
        **TOKEN_IDS,
    )


PRESETS: dict[str, VLMConfig] = {
    # The vision tower is that of Qwen2.5-VL-72B, so its width is 3456. Vocabulary, eps and theta are those of
    # MiMo-7B: the MiMo-VL config.json itself is not public in our sources, so a checkpoint's own values win.
    "mimo_vl_7b": _model(
        3456,
        vocab_size=151680,
        hidden_size=4096,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=11008,
        rms_norm_eps=1e-5,
        rope_theta=640000.0,
    ),
    "qwen2_5_vl_3b": _model(
        3420,
        vocab_size=151936,
        hidden_size=2048,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        intermediate_size=11008,
        tie_word_embeddings=True,
    ),
    "qwen2_5_vl_7b": _model(
        3420,
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        intermediate_size=18944,
    ),
    "qwen2_5_vl_32b": _model(
        3456,
        vocab_size=152064,
        hidden_size=5120,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        intermediate_size=27648,
    ),
    "qwen2_5_vl_72b": _model(
        3456,
        vocab_size=152064,
        hidden_size=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        intermediate_size=29568,
    ),
}

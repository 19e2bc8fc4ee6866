"""Published sizes of Idefics2."""

from __future__ import annotations

from jvlm.models.connectors.perceiver import PerceiverConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.vit import ViTConfig
from jvlm.models.vlm import VLMConfig

# Those of HuggingFaceM4/idefics2-8b.
TOKEN_IDS = {"image_token_id": 32001, "bos_token_id": 1, "eos_token_id": 2}

PRESETS: dict[str, VLMConfig] = {
    # The effective values of HuggingFaceM4/idefics2-8b: most are transformers' defaults, not in its config.json.
    "idefics2_8b": VLMConfig(
        family="idefics2",
        encoder=ViTConfig(),
        connector=PerceiverConfig(),
        decoder=TransformerConfig(
            vocab_size=32003,
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            intermediate_size=14336,
            rms_norm_eps=1e-5,
            qkv_bias=False,
            rope_theta=10000.0,
            sliding_window=4096,
            max_position_embeddings=32768,
        ),
        **TOKEN_IDS,
    ),
}

"""Qwen2.5-VL (arXiv 2502.13923) and MiMo-VL (arXiv 2506.03569), which has its architecture."""

from __future__ import annotations

from jvlm.families import adapters, qwen
from jvlm.families.base import Family
from jvlm.families.qwen2_5_vl.chat_format import CHAT_FORMAT
from jvlm.families.qwen2_5_vl.checkpoint import HF
from jvlm.families.qwen2_5_vl.gguf import GGUF
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig
from jvlm.families.qwen2_5_vl.presets import PRESETS

FAMILY = Family(
    name="qwen2_5_vl",
    chat_format=CHAT_FORMAT,
    image_config=QwenImageConfig(),
    token_ids=qwen.TOKEN_IDS,
    adapter_targets=adapters.AdapterTargets(
        encoder=adapters.FUSED_VIT,
        connector=(r"connector\.(hidden|out)",),
        decoder=adapters.TRANSFORMER,
    ),
    presets=PRESETS,
    hf=HF,
    gguf=GGUF,
)

"""Qwen3-VL (arXiv 2511.21631): dense models and mixtures of experts."""

from __future__ import annotations

from jvlm.families import adapters, qwen
from jvlm.families.base import Family
from jvlm.families.qwen3_vl.chat_format import CHAT_FORMAT
from jvlm.families.qwen3_vl.checkpoint import HF
from jvlm.families.qwen3_vl.gguf import GGUF
from jvlm.families.qwen3_vl.image_processor import Qwen3ImageConfig
from jvlm.families.qwen3_vl.presets import PRESETS

FAMILY = Family(
    name="qwen3_vl",
    chat_format=CHAT_FORMAT,
    image_config=Qwen3ImageConfig(),
    token_ids=qwen.TOKEN_IDS,
    adapter_targets=adapters.AdapterTargets(
        encoder=adapters.FUSED_VIT,
        connector=(r"connector\.(merger|deepstack\.layer)\.(hidden|out)",),
        decoder=adapters.TRANSFORMER,
    ),
    presets=PRESETS,
    hf=HF,
    gguf=GGUF,
)

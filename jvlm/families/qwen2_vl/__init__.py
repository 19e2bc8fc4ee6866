"""Qwen2-VL (arXiv 2409.12191)."""

from __future__ import annotations

import dataclasses

from jvlm.families import adapters, qwen
from jvlm.families.base import Family
from jvlm.families.qwen2_5_vl.chat_format import CHAT_FORMAT
from jvlm.families.qwen2_vl.checkpoint import HF
from jvlm.families.qwen2_vl.image_processor import Qwen2ImageConfig
from jvlm.families.qwen2_vl.presets import PRESETS

FAMILY = Family(
    name="qwen2_vl",
    chat_format=dataclasses.replace(CHAT_FORMAT, box_format="qwen_tokens_1000"),
    image_config=Qwen2ImageConfig(),
    token_ids=qwen.TOKEN_IDS,
    adapter_targets=adapters.AdapterTargets(
        encoder=adapters.FUSED_VIT,
        connector=(r"connector\.(hidden|out)",),
        decoder=adapters.TRANSFORMER,
    ),
    presets=PRESETS,
    hf=HF,
)

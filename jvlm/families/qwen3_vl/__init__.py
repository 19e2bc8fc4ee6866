"""Qwen3-VL (arXiv 2511.21631): dense models and mixtures of experts."""

from __future__ import annotations

from jvlm.families import adapters
from jvlm.families.base import Family
from jvlm.families.qwen3_vl.chat_format import CHAT_FORMAT
from jvlm.families.qwen3_vl.checkpoint import HF
from jvlm.families.qwen3_vl.image_processor import Qwen3ImageConfig
from jvlm.families.qwen3_vl.presets import PRESETS, TOKEN_IDS

FAMILY = Family(
    name="qwen3_vl",
    chat_format=CHAT_FORMAT,
    image_config=Qwen3ImageConfig(),
    token_ids=TOKEN_IDS,
    adapter_targets=adapters.AdapterTargets(
        encoder=(
            r"encoder\.blocks\.layer\.attention\.(qkv_by_head|out)",
            r"encoder\.blocks\.layer\.mlp\.(up|down)",
        ),
        connector=(r"connector\.(merger|deepstack\.layer)\.(hidden|out)",),
        decoder=adapters.TRANSFORMER,
    ),
    presets=PRESETS,
    hf=HF,
)

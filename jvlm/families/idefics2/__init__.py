"""Idefics2 (arXiv 2405.02246), and the gated cross-attention that its paper compares it with."""

from __future__ import annotations

from jvlm.families import adapters
from jvlm.families.base import Family
from jvlm.families.gguf import GGUFFormat
from jvlm.families.idefics2.chat_format import CHAT_FORMAT
from jvlm.families.idefics2.checkpoint import HF
from jvlm.families.idefics2.image_processor import Idefics2ImageConfig
from jvlm.families.idefics2.presets import PRESETS, TOKEN_IDS

FAMILY = Family(
    name="idefics2",
    chat_format=CHAT_FORMAT,
    image_config=Idefics2ImageConfig(),
    token_ids=TOKEN_IDS,
    adapter_targets=adapters.AdapterTargets(
        encoder=adapters.VIT,
        connector=adapters.PERCEIVER,
        decoder=(*adapters.TRANSFORMER, *adapters.CROSS_ATTENTION),
    ),
    presets=PRESETS,
    hf=HF,
    # of its Mistral; llama.cpp has no form of the vision tower and the perceiver
    gguf=GGUFFormat(lambda config: "llama"),
)

"""MM1.5 (arXiv 2409.20566). No checkpoint, chat template or tokenizer of it is published."""

from __future__ import annotations

from jvlm.families import adapters, gguf
from jvlm.families.base import Family
from jvlm.families.mm1_5.image_processor import TiledImageConfig
from jvlm.families.mm1_5.presets import PRESETS, TOKEN_IDS
from jvlm.families.qwen2_5_vl.chat_format import CHAT_FORMAT

FAMILY = Family(
    name="mm1_5",
    chat_format=CHAT_FORMAT,
    image_config=TiledImageConfig(),
    token_ids=TOKEN_IDS,
    adapter_targets=adapters.AdapterTargets(
        encoder=adapters.VIT,
        connector=adapters.PROJECTOR,
        decoder=adapters.TRANSFORMER,
    ),
    presets=PRESETS,
    # llama.cpp has no form of the vision tower and the C-Abstractor
    gguf=gguf.GGUFFormat(gguf.language_model, {**gguf.QWEN2, **gguf.LLAMA3}),
)

"""Idefics3 (arXiv 2408.12637), and SmolVLM's first models (arXiv 2504.05299), which have its architecture."""

from __future__ import annotations

from jvlm.families import adapters
from jvlm.families.base import Family
from jvlm.families.idefics3.chat_format import CHAT_FORMAT
from jvlm.families.idefics3.checkpoint import hf_format
from jvlm.families.idefics3.image_processor import Idefics3ImageConfig
from jvlm.families.idefics3.presets import IDEFICS3_TOKEN_IDS, PRESETS
from jvlm.families.idefics3.processor_files import IDEFICS3

FAMILY = Family(
    name="idefics3",
    chat_format=CHAT_FORMAT,
    image_config=Idefics3ImageConfig(),
    token_ids=IDEFICS3_TOKEN_IDS,
    adapter_targets=adapters.AdapterTargets(
        encoder=adapters.VIT,
        connector=(r"connector\.projection",),
        decoder=adapters.TRANSFORMER,
    ),
    presets=PRESETS,
    hf=hf_format("idefics3", "Idefics3", IDEFICS3),
)

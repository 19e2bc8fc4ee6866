"""SmolVLM2 (arXiv 2504.05299): Idefics3's architecture, and videos."""

from __future__ import annotations

import dataclasses

from jvlm.families import idefics3
from jvlm.families.idefics3.checkpoint import hf_format
from jvlm.families.idefics3.presets import SMOLVLM2, SMOLVLM_TOKEN_IDS
from jvlm.families.smolvlm.chat_format import CHAT_FORMAT
from jvlm.families.smolvlm.processor_files import SMOLVLM
from jvlm.families.smolvlm.video import SmolVLMImageConfig

FAMILY = dataclasses.replace(
    idefics3.FAMILY,
    name="smolvlm",
    chat_format=CHAT_FORMAT,
    image_config=SmolVLMImageConfig(),
    token_ids=SMOLVLM_TOKEN_IDS,
    presets=SMOLVLM2,
    hf=hf_format("smolvlm", "SmolVLM", SMOLVLM),
)

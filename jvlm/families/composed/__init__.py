"""New models put together from a vision tower and a language model that were trained apart: see `compose`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jvlm.data import vocabulary
from jvlm.data.chat_format import ChatFormat
from jvlm.families import adapters, gguf
from jvlm.families.base import Family
from jvlm.families.mm1_5.image_processor import TiledImageConfig
from jvlm.families.qwen2_5_vl.chat_format import CHATML

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig

# The template is the language model's, which knows no images.
CHAT_FORMAT = ChatFormat(CHATML, image="<|image_pad|>", inline=True)


def _text_config(folder: Path) -> VLMConfig:
    from jvlm.families.composed.compose import compose_text

    return compose_text(folder)


FAMILY = Family(
    name="composed",
    chat_format=CHAT_FORMAT,
    image_config=TiledImageConfig(splitting="none", indicator="none"),
    token_ids={},
    adapter_targets=adapters.AdapterTargets(
        encoder=adapters.VIT,
        connector=(*adapters.PERCEIVER, *adapters.PROJECTOR),
        decoder=adapters.TRANSFORMER,
    ),
    gguf=gguf.GGUFFormat(gguf.language_model, {**gguf.QWEN2, **gguf.LLAMA3}),
    prepare_tokenizer=lambda tokenizer: vocabulary.add_tokens(tokenizer, [CHAT_FORMAT.image]),
    text_config=_text_config,
)

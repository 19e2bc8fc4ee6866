"""The configuration of a new model from a vision tower and a language model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jvlm.data import vocabulary
from jvlm.data.tokenizers import load_tokenizer
from jvlm.families.composed import FAMILY
from jvlm.models import contracts
from jvlm.models.connectors.pooled_mlp import PooledMLPConfig
from jvlm.models.encoders.vit import ViTConfig
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLMConfig
from jvlm.weights import backbones


def compose(
    *,
    encoder: str | Path,
    connector: contracts.ConnectorConfig,
    decoder: str | Path,
    grid: int | None = None,
    precision: Precision = Precision(),
) -> VLMConfig:
    """Return the configuration of a new model from a vision tower's folder and a language model's.

    The tokenizer of the decoder's folder gets a placeholder for images behind its last token, if it has none
    (`Family.prepare_tokenizer`); the vocabulary grows by what that needs, in multiples of 128.

    Args:
      grid: side of the encoder's position table, in patches; None keeps the folder's.
    """
    vision = backbones.read_config(encoder)
    if grid is not None:
        vision = dataclasses.replace(vision, grid=grid)
    return _composed(vision, connector, decoder, precision)


def compose_text(decoder: str | Path, *, precision: Precision = Precision()) -> VLMConfig:
    """Return the configuration of a model of text alone on a language model's folder.

    A model has an encoder: this one has the smallest that there is, which text never reaches.
    """
    vision = ViTConfig(depth=1, hidden_size=8, num_heads=1, intermediate_size=8, grid=1)
    return _composed(vision, PooledMLPConfig(grid=1, class_token=False, out_grid=1, depth=1), decoder, precision)


def _composed(
    vision: contracts.EncoderConfig, connector: contracts.ConnectorConfig, decoder: str | Path, precision: Precision
) -> VLMConfig:
    text, tokenizer = backbones.read_config(decoder), load_tokenizer(decoder)
    FAMILY.prepare_tokenizer(tokenizer)
    rows = vocabulary.rows_needed(tokenizer)
    if rows > text.vocab_size:
        text = dataclasses.replace(text, vocab_size=-(-rows // 128) * 128)
    return FAMILY.new_config(
        encoder=vision,
        connector=connector,
        decoder=text,
        image_token_id=tokenizer.convert_tokens_to_ids(FAMILY.chat_format.image),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        precision=precision,
    )

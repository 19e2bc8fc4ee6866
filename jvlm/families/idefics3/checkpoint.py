"""Checkpoints of Idefics3 and SmolVLM (``Idefics3ForConditionalGeneration``, ``SmolVLMForConditionalGeneration``)."""

from __future__ import annotations

import functools
from typing import Any

from jvlm.families.base import HFFormat
from jvlm.families.idefics3 import processor_files
from jvlm.families.idefics3.presets import IDEFICS3_TOKEN_IDS
from jvlm.models.connectors.pixel_shuffle import PixelShuffleConfig
from jvlm.models.token_ids import end_token_id, first_set
from jvlm.models.vlm import VLMConfig
from jvlm.weights.backbones import siglip
from jvlm.weights.backbones import text as language
from jvlm.weights.backbones.vision import vit_rules, vit_sizes
from jvlm.weights.rules import linear, transformer
from jvlm.weights.table import Rule, WeightError

# what the towers have where config.json is silent
_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
}
_TEXT = {"model_type": "llama", "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}


def rules(config: VLMConfig) -> tuple[Rule, ...]:
    """Return the table of tensor names."""
    vision = vit_rules(config.encoder, siglip.NAMES, "encoder.")
    return (
        *(Rule(f"model.vision_model.{r.name}", r.path, r.pattern) for r in vision),
        *linear("model.connector.modality_projection.proj", "connector.projection", bias=False),
        *transformer(config.decoder, "model.text_model"),
    )


def canonical(name: str) -> str | None:
    """Return the name; None for stored frequencies and positions."""
    return None if name.endswith(("rotary_emb.inv_freq", "position_ids")) else name


def read_config(family: str, values: dict[str, Any]) -> VLMConfig:
    """Return the configuration of a config.json; missing keys get the defaults of transformers."""
    text = {**_TEXT, **(values.get("text_config") or {})}
    if text["model_type"] != "llama":
        raise WeightError(f"text_config: model_type {text['model_type']!r} is not supported; supported: llama")
    decoder = language.read_config({**text, "tie_word_embeddings": values.get("tie_word_embeddings")})
    encoder = siglip.read_config({**_VISION, **(values.get("vision_config") or {})})
    factor = values.get("scale_factor", 2)
    if encoder.grid % factor:
        raise WeightError(f"scale_factor {factor} does not divide the {encoder.grid} patches along an image's side")
    return VLMConfig(
        family=family,
        encoder=encoder,
        connector=PixelShuffleConfig(grid=encoder.grid, out_grid=encoder.grid // factor),
        decoder=decoder,
        image_token_id=first_set("image_token_id", values, IDEFICS3_TOKEN_IDS),
        bos_token_id=first_set("bos_token_id", values, text),
        eos_token_id=end_token_id(values, text),
    )


def write_config(kind: str, name: str, config: VLMConfig) -> dict[str, Any]:
    """Return the content of config.json. Raises WeightError for what it cannot express."""
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_id": config.image_token_id,
        "scale_factor": config.connector.factor,
        "tie_word_embeddings": config.decoder.tie_word_embeddings,
        "use_cache": True,
        "text_config": {
            **language.write_config(config.decoder, "llama"),
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "initializer_range": config.precision.initializer_range or 0.02,
        },
        "vision_config": {"model_type": f"{kind}_vision", **siglip.write_config(config.encoder)},
    }


def hf_format(kind: str, name: str, form: processor_files.Form) -> HFFormat:
    """Return how the folders of a family are read and written.

    Args:
      kind: name of the family, which is also its ``model_type``.
      name: what the names of transformers' classes begin with.
      form: its processor files.
    """
    return HFFormat(
        model_types=(kind,),
        read_config=functools.partial(read_config, kind),
        write_config=functools.partial(write_config, kind, name),
        rules=rules,
        axis_sizes=lambda config: vit_sizes(config.encoder),
        canonical=canonical,
        layouts={"released": lambda name: name, "transformers": lambda name: name},
        pixels=processor_files.PIXELS,
        read_image_config=processor_files.reader(form),
        write_image_config=processor_files.writer(form),
    )

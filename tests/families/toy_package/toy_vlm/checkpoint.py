"""Its Hugging Face folders: config.json both ways, the table of tensor names, the image processor's file both ways."""

from __future__ import annotations

from typing import Any

from PIL import Image

from jvlm.families import HFFormat
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.vlm import VLMConfig
from jvlm.weights import processor_files
from jvlm.weights.processor_files import Pixels, ProcessorFiles
from jvlm.weights.rules import linear, norm, transformer
from jvlm.weights.table import Rule
from toy_vlm.encoder import ToyEncoderConfig
from toy_vlm.image_processor import ToyImageConfig

# config.json's name of each field of the decoder
_TEXT = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "intermediate_size",
}
_PIXELS = Pixels((0.5,) * 3, (0.5,) * 3, Image.Resampling.BILINEAR)


def read_config(values: dict[str, Any]) -> VLMConfig:
    """Return the configuration of a config.json."""
    decoder = TransformerConfig(qkv_bias=False, **{ours: values[theirs] for theirs, ours in _TEXT.items()})
    return VLMConfig(
        family="toy_vlm",
        encoder=ToyEncoderConfig(hidden_size=values["vision_hidden_size"]),
        connector=PatchMergerConfig(merge=1),
        decoder=decoder,
        image_token_id=values["image_token_id"],
        eos_token_id=values["eos_token_id"],
    )


def write_config(config: VLMConfig) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "model_type": "toy_vlm",
        "vision_hidden_size": config.encoder.hidden_size,
        "image_token_id": config.image_token_id,
        "eos_token_id": config.eos_token_id,
        **{theirs: getattr(config.decoder, ours) for theirs, ours in _TEXT.items()},
    }


def rules(config: VLMConfig) -> tuple[Rule, ...]:
    """Return a line for each tensor: its name, the parameter's path, and an einops pattern between the two."""
    return (
        Rule("vision.patch.weight", "encoder.patch_embed.kernel", "d c y x -> (c y x) d"),
        Rule("vision.patch.bias", "encoder.patch_embed.bias"),
        *linear("vision.mix", "encoder.mix", bias=False),
        *norm("projector.norm", "connector.norm"),
        *linear("projector.hidden", "connector.hidden", bias=True),
        *linear("projector.out", "connector.out", bias=True),
        *transformer(config.decoder),
    )


def read_image_config(files: ProcessorFiles, config: VLMConfig, stored: ToyImageConfig | None) -> ToyImageConfig:
    """Return the settings of preprocessor_config.json."""
    grid = None if files.image is None else files.image.get("grid")
    return (stored or ToyImageConfig()) if grid is None else ToyImageConfig(grid=grid)


def write_image_config(config: VLMConfig, image: ToyImageConfig) -> dict[str, dict[str, Any]]:
    """Return the content of each processor file."""
    return {processor_files.IMAGE: {"image_processor_type": "ToyImageProcessor", "grid": image.grid}}


HF = HFFormat(
    model_types=("toy_vlm",),
    read_config=read_config,
    write_config=write_config,
    rules=rules,
    axis_sizes=lambda config: {"c": 3, "y": config.encoder.patch_size, "x": config.encoder.patch_size},
    canonical=lambda name: name,
    layouts={"released": lambda name: name},
    pixels=_PIXELS,
    read_image_config=read_image_config,
    write_image_config=write_image_config,
)

"""Idefics2 checkpoints (``Idefics2ForConditionalGeneration``)."""

from __future__ import annotations

import dataclasses
from typing import Any

from PIL import Image

from jvlm.data.vision import MediaConfig
from jvlm.data.vision.edges import EdgeLimits
from jvlm.models.connectors.perceiver import PerceiverConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.token_ids import end_token_id, first_set
from jvlm.models.vlm import VLMConfig
from jvlm.weights import processor_files
from jvlm.weights.backbones import siglip
from jvlm.weights.backbones import text as language
from jvlm.weights.backbones.vision import vit_rules, vit_sizes
from jvlm.weights.processor_files import Pixels, ProcessorFiles
from jvlm.weights.rules import linear, norm, swiglu, transformer
from jvlm.weights.table import Architecture, Rule, WeightError

_PERCEIVER = "model.connector.perceiver_resampler"
_PIXELS = Pixels((0.5,) * 3, (0.5,) * 3, Image.Resampling.BILINEAR)
# What the towers have where config.json is silent.
_VISION = {"image_size": 224, "patch_size": 32}
_TEXT = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
}


def _rules(config: VLMConfig) -> tuple[Rule, ...]:
    layer, to = f"{_PERCEIVER}.layers.{{i}}", "connector.blocks.layer"
    vision = vit_rules(config.encoder, siglip.NAMES, "encoder.")
    return (
        *(Rule(f"model.vision_model.{r.name}", r.path, r.pattern) for r in vision),
        *swiglu("model.connector.modality_projection", "connector.projection", bias=False),
        Rule(f"{_PERCEIVER}.latents", "connector.latents"),
        *norm(f"{layer}.input_latents_norm", f"{to}.norm1"),
        *norm(f"{layer}.input_context_norm", f"{to}.norm_patches"),
        *norm(f"{layer}.post_attention_layernorm", f"{to}.norm2"),
        *(r for p in "qkv" for r in linear(f"{layer}.self_attn.{p}_proj", f"{to}.attention.{p}", bias=False)),
        *linear(f"{layer}.self_attn.o_proj", f"{to}.attention.out", bias=False),
        *swiglu(f"{layer}.mlp", f"{to}.mlp", bias=False),
        *norm(f"{_PERCEIVER}.norm", "connector.norm"),
        *transformer(config.decoder, "model.text_model"),
    )


def _canonical(name: str) -> str | None:
    return None if name.endswith("rotary_emb.inv_freq") else name


def _read_config(values: dict[str, Any]) -> VLMConfig:
    """config.json with whatever keys are left out filled with transformers' defaults, as the released one needs."""
    text, perceiver = values.get("text_config") or {}, values.get("perceiver_config") or {}
    vision = {**_VISION, **(values.get("vision_config") or {})}
    if perceiver.get("hidden_act", "silu") != "silu":
        raise WeightError(f"perceiver_config: hidden_act {perceiver['hidden_act']!r} is not supported; supported: silu")
    if text.get("model_type", "mistral") != "mistral":
        raise WeightError(f"text_config: model_type {text['model_type']!r} is not supported; supported: mistral")
    decoder = language.read_config({**_TEXT, **text, "tie_word_embeddings": values.get("tie_word_embeddings")})
    width = perceiver.get("hidden_size", 4096)
    if width != decoder.hidden_size:
        raise WeightError(f"perceiver_config.hidden_size {width} must equal text_config's {decoder.hidden_size}")
    default = PerceiverConfig()
    return VLMConfig(
        architecture="idefics2",
        encoder=siglip.read_config(vision),
        connector=PerceiverConfig(
            projection_size=decoder.intermediate_size,
            latents=perceiver.get("resampler_n_latents", default.latents),
            depth=perceiver.get("resampler_depth", default.depth),
            num_heads=perceiver.get("resampler_n_heads", default.num_heads),
            num_kv_heads=perceiver.get("num_key_value_heads", default.num_kv_heads),
            head_dim=perceiver.get("resampler_head_dim", default.head_dim),
            norm_eps=perceiver.get("rms_norm_eps", default.norm_eps),
        ),
        decoder=decoder,
        image_token_id=first_set("image_token_id", values, default=32001),
        video_token_id=None,
        vision_start_token_id=None,
        vision_end_token_id=None,
        vision_pad_token_id=None,
        bos_token_id=first_set("bos_token_id", values, {"bos_token_id": 1, **text}),
        eos_token_id=end_token_id(values, {"eos_token_id": 2, **text}),
    )


def _write_mistral(config: TransformerConfig) -> dict[str, Any]:
    plain = TransformerConfig(
        qkv_bias=False,
        **{
            name: getattr(config, name)
            for name in "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size "
            "rms_norm_eps rope_theta sliding_window tie_word_embeddings max_position_embeddings".split()
        },
    )
    if plain != config:
        raise WeightError(f"config.json cannot say what this decoder has beside a Mistral's parts: {config}")
    return {
        "model_type": "mistral",
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _write_config(config: VLMConfig) -> dict[str, Any]:
    vit, perceiver, llm = config.encoder, config.connector, config.decoder
    if perceiver.projection_size != llm.intermediate_size:
        raise WeightError(
            f"config.json has one width for the projection ({perceiver.projection_size}) and the decoder's MLP "
            f"({llm.intermediate_size}): make them equal to export"
        )
    return {
        "architectures": ["Idefics2ForConditionalGeneration"],
        "model_type": "idefics2",
        "image_token_id": config.image_token_id,
        "tie_word_embeddings": llm.tie_word_embeddings,
        "use_cache": True,
        "perceiver_config": {
            "model_type": "idefics2_perceiver",
            "hidden_act": "silu",
            "hidden_size": llm.hidden_size,
            "num_key_value_heads": perceiver.num_kv_heads,
            "resampler_depth": perceiver.depth,
            "resampler_head_dim": perceiver.head_dim,
            "resampler_n_heads": perceiver.num_heads,
            "resampler_n_latents": perceiver.latents,
            "rms_norm_eps": perceiver.norm_eps,
        },
        "text_config": {
            **_write_mistral(llm),
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": 0,
            "initializer_range": config.precision.initializer_range or 0.02,
        },
        "vision_config": {
            "model_type": "idefics2_vision",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vit.hidden_size,
            "image_size": vit.grid * vit.patch_size,
            "intermediate_size": vit.intermediate_size,
            "layer_norm_eps": vit.norm_eps,
            "num_attention_heads": vit.num_heads,
            "num_channels": vit.in_channels,
            "num_hidden_layers": vit.depth,
            "patch_size": vit.patch_size,
        },
    }


def _read_media(files: ProcessorFiles, config: VLMConfig, stored: MediaConfig | None) -> EdgeLimits:
    media = stored if isinstance(stored, EdgeLimits) else EdgeLimits()
    if files.processor is not None and files.processor.get("image_seq_len") is not None:
        files.processor.require("image_seq_len", 64, config.connector.latents)
    if files.image is None:
        return media
    files.image.require_type("image_processor_type", ("Idefics2ImageProcessor",))
    shortest, longest = processor_files.edges(files.image, (378, 980), area=False)
    processor_files.check_order(files.image, shortest, longest)
    pixels = processor_files.read_pixels(files.image, _PIXELS)
    return dataclasses.replace(
        media,
        longest_edge=longest,
        shortest_edge=shortest,
        split=files.image.flag("do_image_splitting", False),  # transformers' own default
        resample=pixels.resample,
        resize=pixels.resize,
    )


def _write_preprocessors(config: VLMConfig, media: EdgeLimits) -> dict[str, dict[str, Any]]:
    vit = config.encoder
    preprocessor = {
        **processor_files.write_pixels(Pixels(vit.image_mean, vit.image_std, media.resample, media.resize)),
        "do_image_splitting": media.split,
        "do_pad": True,
        "image_processor_type": "Idefics2ImageProcessor",
        "processor_class": "Idefics2Processor",
        "size": {"longest_edge": media.longest_edge, "shortest_edge": media.shortest_edge},
    }
    processor = {"image_seq_len": config.connector.latents, "processor_class": "Idefics2Processor"}
    return {processor_files.IMAGE: preprocessor, processor_files.PROCESSOR: processor}


ARCHITECTURE = Architecture(
    name="idefics2",
    model_types=("idefics2",),
    rules=_rules,
    sizes=lambda config: vit_sizes(config.encoder),
    canonical=_canonical,
    layouts={"released": lambda name: name, "transformers": lambda name: name},
    read_config=_read_config,
    write_config=_write_config,
    pixels=_PIXELS,
    read_media=_read_media,
    write_preprocessors=_write_preprocessors,
)

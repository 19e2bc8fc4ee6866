"""Checkpoints of Idefics2 (``Idefics2ForConditionalGeneration``): config.json and tensor names."""

from __future__ import annotations

from typing import Any

from jvlm.families.base import HFFormat
from jvlm.families.idefics2 import processor_files
from jvlm.families.idefics2.presets import TOKEN_IDS
from jvlm.models.connectors.perceiver import PerceiverConfig
from jvlm.models.decoders.cross_attention import CrossAttentionTransformerConfig
from jvlm.models.token_ids import end_token_id, first_set
from jvlm.models.vlm import VLMConfig
from jvlm.weights.backbones import siglip
from jvlm.weights.backbones import text as language
from jvlm.weights.backbones.vision import vit_rules, vit_sizes
from jvlm.weights.rules import linear, norm, swiglu, transformer
from jvlm.weights.table import Rule, WeightError

_PERCEIVER = "model.connector.perceiver_resampler"
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


def rules(config: VLMConfig) -> tuple[Rule, ...]:
    """Return the table of tensor names."""
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


def canonical(name: str) -> str | None:
    """Return the name; None for stored frequencies."""
    return None if name.endswith("rotary_emb.inv_freq") else name


def read_config(values: dict[str, Any]) -> VLMConfig:
    """Return the configuration of a config.json; missing keys get the defaults of transformers."""
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
        family="idefics2",
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
        image_token_id=first_set("image_token_id", values, TOKEN_IDS),
        bos_token_id=first_set("bos_token_id", values, {**TOKEN_IDS, **text}),
        eos_token_id=end_token_id(values, {**TOKEN_IDS, **text}),
    )


def write_config(config: VLMConfig) -> dict[str, Any]:
    """Return the content of config.json. Raises WeightError for what it cannot express."""
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
            **language.write_config(llm, "mistral"),
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": 0,
            "initializer_range": config.precision.initializer_range or 0.02,
        },
        "vision_config": {
            "model_type": "idefics2_vision",
            **siglip.write_config(vit),
        },
    }


def unsupported(config: VLMConfig) -> str | None:
    """Return what no released checkpoint has: the paper compares with it, but no weights of that were published."""
    return "gated cross-attention" if isinstance(config.decoder, CrossAttentionTransformerConfig) else None


HF = HFFormat(
    model_types=("idefics2",),
    read_config=read_config,
    write_config=write_config,
    rules=rules,
    axis_sizes=lambda config: vit_sizes(config.encoder),
    canonical=canonical,
    layouts={"released": lambda name: name, "transformers": lambda name: name},
    pixels=processor_files.PIXELS,
    read_image_config=processor_files.read_image_config,
    write_image_config=processor_files.write_image_config,
    unsupported=unsupported,
)

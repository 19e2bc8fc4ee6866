"""Qwen2.5-VL and MiMo-VL checkpoints (``Qwen2_5_VLForConditionalGeneration``)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from PIL import Image

from jvlm.data.vision import MediaConfig, PixelLimits
from jvlm.models import layers
from jvlm.models.connectors.patch_merger import PatchMergerConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.qwen_vit import QwenViTConfig
from jvlm.models.token_ids import end_token_id
from jvlm.models.vlm import VLMConfig
from jvlm.weights import processor_files
from jvlm.weights.processor_files import Pixels, ProcessorFiles, Settings
from jvlm.weights.rules import linear, norm, swiglu, transformer
from jvlm.weights.table import Architecture, Rule, WeightError


def _rules(config: VLMConfig) -> tuple[Rule, ...]:
    vit, to_vit = "visual.blocks.{i}", "encoder.blocks.layer"
    return (
        Rule("visual.patch_embed.proj.weight", "encoder.patch_embed.kernel", "d c t y x -> (c t y x) d"),
        *norm(f"{vit}.norm1", f"{to_vit}.norm1"),
        *norm(f"{vit}.norm2", f"{to_vit}.norm2"),
        Rule(f"{vit}.attn.qkv.weight", f"{to_vit}.attention.qkv_by_head.kernel", "(qkv h k) i -> i (h qkv k)"),
        Rule(f"{vit}.attn.qkv.bias", f"{to_vit}.attention.qkv_by_head.bias", "(qkv h k) -> (h qkv k)"),
        *linear(f"{vit}.attn.proj", f"{to_vit}.attention.out", bias=True),
        *swiglu(f"{vit}.mlp", f"{to_vit}.mlp", bias=True),
        *norm("visual.merger.ln_q", "connector.norm"),
        *linear("visual.merger.mlp.0", "connector.hidden", bias=True),
        *linear("visual.merger.mlp.2", "connector.out", bias=True),
        *transformer(config.decoder),
    )


def _sizes(config: VLMConfig) -> dict[str, int]:
    vit = config.encoder
    patch = {"c": vit.in_channels, "t": vit.temporal_patch_size, "y": vit.patch_size, "x": vit.patch_size}
    return {**patch, "qkv": 3, "h": vit.num_heads, "k": vit.head_dim}


def _canonical(name: str) -> str | None:
    """Both published layouts to the older one, which every released checkpoint uses."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def _new_layout(name: str) -> str:
    """The names that transformers >= 4.52 uses in memory."""
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?!visual\.)", "model.language_model.", name)


def _read_config(values: dict[str, Any]) -> VLMConfig:
    """config.json of any age: flat or with ``text_config``, missing keys filled with the published values."""
    text = {**values, **(values.get("text_config") or {})}
    vision = values.get("vision_config") or {}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise WeightError(f"rope type {kind!r} is not supported; supported: default, mrope")
    if text.get("use_sliding_window"):
        raise WeightError("use_sliding_window=true is not supported by this architecture's decoder")
    for owner, part in (("config", text), ("vision_config", vision)):
        if part.get("hidden_act", "silu") != "silu":
            raise WeightError(f"{owner}: hidden_act {part['hidden_act']!r} is not supported; supported: silu")
    heads = text["num_attention_heads"]
    half_head = text["hidden_size"] // heads // 2
    default = QwenViTConfig()
    depth = vision.get("depth", default.depth)
    encoder = QwenViTConfig(
        depth=depth,
        hidden_size=vision.get("hidden_size", default.hidden_size),
        num_heads=vision.get("num_heads", default.num_heads),
        intermediate_size=vision.get("intermediate_size", default.intermediate_size),
        in_channels=vision.get("in_channels", vision.get("in_chans", default.in_channels)),
        patch_size=vision.get("patch_size", vision.get("spatial_patch_size", default.patch_size)),
        temporal_patch_size=vision.get("temporal_patch_size", default.temporal_patch_size),
        spatial_merge_size=vision.get("spatial_merge_size", default.spatial_merge_size),
        window_size=vision.get("window_size", default.window_size),
        fullatt_block_indexes=tuple(
            vision.get("fullatt_block_indexes", [i for i in default.fullatt_block_indexes if i < depth])
        ),
        tokens_per_second=vision.get("tokens_per_second", default.tokens_per_second),
    )
    if vision.get("out_hidden_size", text["hidden_size"]) != text["hidden_size"]:
        raise WeightError(
            f"vision_config.out_hidden_size {vision['out_hidden_size']} must equal hidden_size {text['hidden_size']}"
        )
    decoder = TransformerConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        intermediate_size=text["intermediate_size"],
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
        mrope_section=tuple(rope.get("mrope_section") or _default_section(half_head)),
        # before transformers 5 the nested configuration alone may say so
        tie_word_embeddings=bool(values.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        max_position_embeddings=text.get("max_position_embeddings", 128000),
    )
    ids = {k: v for part in (text, values) for k, v in part.items() if v is not None}
    start = ids.get("vision_start_token_id", 151652)
    return VLMConfig(
        architecture="qwen2_5_vl",
        encoder=encoder,
        connector=PatchMergerConfig(merge=encoder.spatial_merge_size),
        decoder=decoder,
        image_token_id=ids.get("image_token_id", 151655),
        video_token_id=ids.get("video_token_id", 151656),
        vision_start_token_id=start,
        vision_end_token_id=ids.get("vision_end_token_id", start + 1),
        vision_pad_token_id=ids.get("vision_token_id", ids.get("vision_end_token_id", start + 1) + 1),
        bos_token_id=ids.get("bos_token_id"),
        eos_token_id=end_token_id(values, {"eos_token_id": 151645, **(values.get("text_config") or values)}),
    )


def _default_section(half: int) -> tuple[int, int, int]:
    if half == 64:
        return (16, 24, 24)
    raise WeightError(f"mrope_section is missing and has no default for heads of {2 * half}")


def _write_config(config: VLMConfig) -> dict[str, Any]:
    """The flat form of the released checkpoints: read by transformers 4.49 and everything after it."""
    vit, llm = config.encoder, config.decoder
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "vision_token_id": config.vision_pad_token_id,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "initializer_range": config.precision.initializer_range or 0.02,
        "intermediate_size": llm.intermediate_size,
        "max_position_embeddings": llm.max_position_embeddings,
        "max_window_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_hidden_layers": llm.num_layers,
        "num_key_value_heads": llm.num_kv_heads,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_theta": llm.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(llm.mrope_section)},
        "sliding_window": 32768,
        "tie_word_embeddings": llm.tie_word_embeddings,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": llm.vocab_size,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": vit.depth,
            "hidden_act": "silu",
            "hidden_size": vit.hidden_size,
            "intermediate_size": vit.intermediate_size,
            "num_heads": vit.num_heads,
            "in_channels": vit.in_channels,
            "in_chans": vit.in_channels,
            "out_hidden_size": llm.hidden_size,
            "patch_size": vit.patch_size,
            "spatial_patch_size": vit.patch_size,
            "spatial_merge_size": vit.spatial_merge_size,
            "temporal_patch_size": vit.temporal_patch_size,
            "window_size": vit.window_size,
            "fullatt_block_indexes": list(vit.fullatt_block_indexes),
            "tokens_per_second": vit.tokens_per_second,
        },
    }


# What transformers' processors have where the files are silent.
_PIXELS = Pixels(layers.CLIP_MEAN, layers.CLIP_STD, Image.Resampling.BICUBIC)
_IMAGE_AREA, _VIDEO_AREA = (4 * 784, 1280 * 784), (128 * 784, 768 * 784)
_VIDEO_TYPES = ("Qwen2VLVideoProcessor", "Qwen2_5_VLVideoProcessor")
_PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}


def _patches(vit: QwenViTConfig) -> dict[str, int]:
    """The processor's names of the tower's measures."""
    sizes = (vit.patch_size, vit.temporal_patch_size, vit.spatial_merge_size)
    return dict(zip(_PATCHES, sizes, strict=True))


def _read_media(files: ProcessorFiles, config: VLMConfig, stored: MediaConfig | None) -> PixelLimits:
    media = stored if isinstance(stored, PixelLimits) else PixelLimits()
    if files.image is not None:
        files.image.require_type("image_processor_type", ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"))
        for key, size in _patches(config.encoder).items():
            files.image.require(key, _PATCHES[key], size)
        pixels = processor_files.read_pixels(files.image, _PIXELS)
        least, most = processor_files.edges(files.image, _IMAGE_AREA, area=True)
        processor_files.check_order(files.image, least, most)
        media = dataclasses.replace(
            media, min_pixels=least, max_pixels=most, resample=pixels.resample, resize=pixels.resize
        )
    if files.video is not None:
        least, most = processor_files.edges(files.video, _VIDEO_AREA, area=True)
        media = dataclasses.replace(
            media,
            video_min_pixels=least,
            video_max_pixels=most,
            fps=files.video.number("fps", media.fps),
            no_videos=_why_no_videos(files.video, config.encoder, media) or media.no_videos,
        )
    return media


def _why_no_videos(video: Settings, vit: QwenViTConfig, media: PixelLimits) -> str:
    """What keeps videos from being made as these settings say; one pixel rule serves pictures and videos here."""
    wanted = dataclasses.asdict(processor_files.read_pixels(video, _PIXELS))
    here = {"mean": vit.image_mean, "std": vit.image_std, "resample": media.resample, "resize": media.resize}
    wanted |= {key: video.get(key, size) for key, size in _PATCHES.items()}
    here |= _patches(vit)
    kind = video.get("video_processor_type", "Qwen2VLVideoProcessor")
    lines = [f"{key} of videos is {wanted[key]}, of pictures {here[key]}" for key in here if wanted[key] != here[key]]
    lines += [f"{key} is on" for key in ("do_sample_frames", "cap_pixels_per_frame") if video.get(key)]
    lines += [f"video_processor_type is {kind}"] if kind not in _VIDEO_TYPES else []
    return f"{video.source}: {'; '.join(lines)}; jvlm cannot do this" if lines else ""


def _write_preprocessors(config: VLMConfig, limits: PixelLimits) -> dict[str, dict[str, Any]]:
    vit = config.encoder
    common = {
        **processor_files.write_pixels(Pixels(vit.image_mean, vit.image_std, limits.resample, limits.resize)),
        **_patches(vit),
        "processor_class": "Qwen2_5_VLProcessor",
    }

    def area(least: int, most: int) -> dict[str, Any]:
        return {"min_pixels": least, "max_pixels": most, "size": {"shortest_edge": least, "longest_edge": most}}

    image = {**common, **area(limits.min_pixels, limits.max_pixels), "image_processor_type": "Qwen2VLImageProcessor"}
    video = {**common, **area(limits.video_min_pixels, limits.video_max_pixels), "fps": limits.fps}
    video["video_processor_type"] = _VIDEO_TYPES[0]
    return {processor_files.IMAGE: image, processor_files.VIDEO: video}


ARCHITECTURE = Architecture(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    rules=_rules,
    sizes=_sizes,
    canonical=_canonical,
    layouts={"released": lambda name: name, "transformers": _new_layout},
    read_config=_read_config,
    write_config=_write_config,
    pixels=_PIXELS,
    read_media=_read_media,
    write_preprocessors=_write_preprocessors,
)

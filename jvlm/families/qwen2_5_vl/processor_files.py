"""Processor files of Qwen2.5-VL and MiMo-VL."""

from __future__ import annotations

import dataclasses
from typing import Any

from PIL import Image

from jvlm.data.image_processor import ImageProcessorConfig
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig
from jvlm.models import layers
from jvlm.models.encoders.qwen_vit import QwenViTConfig
from jvlm.models.vlm import VLMConfig
from jvlm.weights import processor_files
from jvlm.weights.processor_files import Pixels, ProcessorFiles, Settings

# What transformers' processors have where the files are silent.
PIXELS = Pixels(layers.CLIP_MEAN, layers.CLIP_STD, Image.Resampling.BICUBIC)
_IMAGE_AREA, _VIDEO_AREA = (4 * 784, 1280 * 784), (128 * 784, 768 * 784)
_VIDEO_TYPES = ("Qwen2VLVideoProcessor", "Qwen2_5_VLVideoProcessor")
_PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}


def _patches(vit: QwenViTConfig) -> dict[str, int]:
    """Return the processor's names of the tower's measures."""
    sizes = (vit.patch_size, vit.temporal_patch_size, vit.spatial_merge_size)
    return dict(zip(_PATCHES, sizes, strict=True))


def read_image_config(files: ProcessorFiles, config: VLMConfig, stored: ImageProcessorConfig | None) -> QwenImageConfig:
    """Return what the files say, over the stored settings."""
    image = stored if isinstance(stored, QwenImageConfig) else QwenImageConfig()
    if files.image is not None:
        files.image.require_type("image_processor_type", ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"))
        for key, size in _patches(config.encoder).items():
            files.image.require(key, _PATCHES[key], size)
        pixels = processor_files.read_pixels(files.image, PIXELS)
        least, most = processor_files.edges(files.image, _IMAGE_AREA, area=True)
        processor_files.check_order(files.image, least, most)
        image = dataclasses.replace(
            image, min_pixels=least, max_pixels=most, resample=pixels.resample, resize=pixels.resize
        )
    if files.video is not None:
        least, most = processor_files.edges(files.video, _VIDEO_AREA, area=True)
        image = dataclasses.replace(
            image,
            video_min_pixels=least,
            video_max_pixels=most,
            fps=files.video.number("fps", image.fps),
            no_videos=_why_no_videos(files.video, config.encoder, image) or image.no_videos,
        )
    return image


def _why_no_videos(video: Settings, vit: QwenViTConfig, image: QwenImageConfig) -> str:
    """Return what keeps videos from being made as these settings say; one pixel rule serves images and videos here."""
    wanted = dataclasses.asdict(processor_files.read_pixels(video, PIXELS))
    here = {"mean": vit.image_mean, "std": vit.image_std, "resample": image.resample, "resize": image.resize}
    wanted |= {key: video.get(key, size) for key, size in _PATCHES.items()}
    here |= _patches(vit)
    kind = video.get("video_processor_type", "Qwen2VLVideoProcessor")
    lines = [f"{key} of videos is {wanted[key]}, of images {here[key]}" for key in here if wanted[key] != here[key]]
    lines += [f"{key} is on" for key in ("do_sample_frames", "cap_pixels_per_frame") if video.get(key)]
    lines += [f"video_processor_type is {kind}"] if kind not in _VIDEO_TYPES else []
    return f"{video.source}: {'; '.join(lines)}; jvlm cannot do this" if lines else ""


def write_image_config(config: VLMConfig, limits: QwenImageConfig) -> dict[str, dict[str, Any]]:
    """Return the content of each processor file."""
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

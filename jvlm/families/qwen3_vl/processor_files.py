"""Processor files of Qwen3-VL."""

from __future__ import annotations

import dataclasses
from typing import Any

from PIL import Image

from jvlm.data.image_processor import ImageProcessorConfig
from jvlm.families.qwen3_vl.image_processor import Qwen3ImageConfig
from jvlm.families.qwen3_vl.vision import Qwen3ViTConfig
from jvlm.models.vlm import VLMConfig
from jvlm.weights import processor_files
from jvlm.weights.processor_files import Pixels, ProcessorFiles, Settings

# What the released files say, and transformers' video processor where they are silent.
PIXELS = Pixels((0.5,) * 3, (0.5,) * 3, Image.Resampling.BICUBIC)
# What transformers' image processor, made for Qwen2-VL, has where the files are silent.
_IMAGE_AREA, _IMAGE_PATCHES = (56 * 56, 28 * 28 * 1280), {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
_VIDEO_AREA, _VIDEO_PATCHES = (128 * 32 * 32, 768 * 32 * 32), {**_IMAGE_PATCHES, "patch_size": 16}
_IMAGE_TYPE, _VIDEO_TYPE = "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"


def _patches(vit: Qwen3ViTConfig) -> dict[str, int]:
    """Return the processor's names of the tower's measures."""
    sizes = (vit.patch_size, vit.temporal_patch_size, vit.spatial_merge_size)
    return dict(zip(_IMAGE_PATCHES, sizes, strict=True))


def read_image_config(
    files: ProcessorFiles, config: VLMConfig, stored: ImageProcessorConfig | None
) -> Qwen3ImageConfig:
    """Return what the files say, over the stored settings."""
    image = stored if isinstance(stored, Qwen3ImageConfig) else Qwen3ImageConfig()
    if files.image is not None:
        files.image.require_type("image_processor_type", (_IMAGE_TYPE, "Qwen3VLImageProcessor"))
        for key, size in _patches(config.encoder).items():
            files.image.require(key, _IMAGE_PATCHES[key], size)
        pixels = processor_files.read_pixels(files.image, PIXELS)
        least, most = processor_files.edges(files.image, _IMAGE_AREA, area=True)
        processor_files.check_order(files.image, least, most)
        image = dataclasses.replace(
            image, min_pixels=least, max_pixels=most, resample=pixels.resample, resize=pixels.resize
        )
    # without a file of its own, a video processor of transformers takes the images' limits for its own
    if files.video is not None and files.video != files.image:
        least, most = processor_files.edges(files.video, _VIDEO_AREA, area=False)
        image = dataclasses.replace(
            image,
            video_min_pixels=least,
            video_max_pixels=most,
            fps=files.video.number("fps", image.fps),
            min_frames=int(files.video.number("min_frames", image.min_frames)),
            max_frames=int(files.video.number("max_frames", image.max_frames)),
            cap_frames=files.video.flag("cap_pixels_per_frame", False),
            frame_tokens=int(files.video.number("max_video_tokens", image.frame_tokens)),
            no_videos=_why_no_videos(files.video, config.encoder, image) or image.no_videos,
        )
    return image


def _why_no_videos(video: Settings, vit: Qwen3ViTConfig, image: Qwen3ImageConfig) -> str:
    """Return what keeps videos from being made as these settings say; one pixel rule serves images and videos here."""
    wanted = dataclasses.asdict(processor_files.read_pixels(video, PIXELS))
    here = {"mean": vit.image_mean, "std": vit.image_std, "resample": image.resample, "resize": image.resize}
    wanted |= {key: video.get(key, size) for key, size in _VIDEO_PATCHES.items()}
    here |= _patches(vit)
    kind = video.get("video_processor_type", _VIDEO_TYPE)
    lines = [f"{key} of videos is {wanted[key]}, of images {here[key]}" for key in here if wanted[key] != here[key]]
    lines += [f"video_processor_type is {kind}"] if kind != _VIDEO_TYPE else []
    return f"{video.source}: {'; '.join(lines)}; jvlm cannot do this" if lines else ""


def write_image_config(config: VLMConfig, image: Qwen3ImageConfig) -> dict[str, dict[str, Any]]:
    """Return the content of each processor file."""
    vit = config.encoder
    common = {
        **processor_files.write_pixels(Pixels(vit.image_mean, vit.image_std, image.resample, image.resize)),
        **_patches(vit),
        "processor_class": "Qwen3VLProcessor",
    }
    images = {
        **common,
        "size": {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels},
        "image_processor_type": _IMAGE_TYPE,
    }
    videos = {
        **common,
        "size": {"shortest_edge": image.video_min_pixels, "longest_edge": image.video_max_pixels},
        "fps": image.fps,
        "min_frames": image.min_frames,
        "max_frames": image.max_frames,
        "do_sample_frames": True,
        "cap_pixels_per_frame": image.cap_frames,
        "max_video_tokens": image.frame_tokens,
        "video_processor_type": _VIDEO_TYPE,
    }
    return {processor_files.IMAGE: images, processor_files.VIDEO: videos}

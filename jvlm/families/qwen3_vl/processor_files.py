"""Processor files of Qwen3-VL."""

from __future__ import annotations

import dataclasses
from typing import Any

from PIL import Image

from jvlm.data.image_processor import ImageProcessorConfig
from jvlm.families import merged_processor_files
from jvlm.families.qwen3_vl.image_processor import Qwen3ImageConfig
from jvlm.models.vlm import VLMConfig
from jvlm.weights import processor_files
from jvlm.weights.processor_files import Pixels, ProcessorFiles

# What the released files say, and transformers' video processor where they are silent.
PIXELS = Pixels((0.5,) * 3, (0.5,) * 3, Image.Resampling.BICUBIC)
_VIDEO_AREA = (128 * 32 * 32, 768 * 32 * 32)
_DEFAULTS = merged_processor_files.Defaults(
    PIXELS,
    # of transformers' image processor, made for Qwen2-VL
    image_area=(56 * 56, 28 * 28 * 1280),
    video_types=("Qwen3VLVideoProcessor",),
    video_patch_size=16,
)
_IMAGE_TYPES = (merged_processor_files.IMAGE_TYPE, "Qwen3VLImageProcessor")


def read_image_config(
    files: ProcessorFiles, config: VLMConfig, stored: ImageProcessorConfig | None
) -> Qwen3ImageConfig:
    """Return what the files say, over the stored settings."""
    image = stored if isinstance(stored, Qwen3ImageConfig) else Qwen3ImageConfig()
    if files.image is not None:
        image = merged_processor_files.read_images(image, files.image, config.encoder, _DEFAULTS, _IMAGE_TYPES)
    # without a file of its own, a video processor of transformers takes the images' limits for its own
    if files.video is not None and files.video != files.image:
        least, most = processor_files.edges(files.video, _VIDEO_AREA, area=False)
        why_not = merged_processor_files.why_no_videos(files.video, config.encoder, image, _DEFAULTS)
        image = dataclasses.replace(
            image,
            video_min_pixels=least,
            video_max_pixels=most,
            fps=files.video.number("fps", image.fps),
            min_frames=int(files.video.number("min_frames", image.min_frames)),
            max_frames=int(files.video.number("max_frames", image.max_frames)),
            cap_frames=files.video.flag("cap_pixels_per_frame", False),
            frame_tokens=int(files.video.number("max_video_tokens", image.frame_tokens)),
            no_videos=why_not or image.no_videos,
        )
    return image


def write_image_config(config: VLMConfig, image: Qwen3ImageConfig) -> dict[str, dict[str, Any]]:
    """Return the content of each processor file."""
    video = {
        "min_frames": image.min_frames,
        "max_frames": image.max_frames,
        "do_sample_frames": True,
        "cap_pixels_per_frame": image.cap_frames,
        "max_video_tokens": image.frame_tokens,
    }
    return merged_processor_files.written(
        config.encoder, image, _DEFAULTS, "Qwen3VLProcessor", beside=False, video=video
    )

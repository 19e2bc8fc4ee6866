"""Processor files of Qwen2.5-VL and MiMo-VL, which Qwen2-VL shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from PIL import Image

from jvlm.data.image_processor import ImageProcessorConfig
from jvlm.families import merged_processor_files
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig
from jvlm.models import layers
from jvlm.models.vlm import VLMConfig
from jvlm.weights import processor_files
from jvlm.weights.processor_files import Pixels, ProcessorFiles

PIXELS = Pixels(layers.CLIP_MEAN, layers.CLIP_STD, Image.Resampling.BICUBIC)
_VIDEO_AREA = (128 * 784, 768 * 784)
_DEFAULTS = merged_processor_files.Defaults(
    PIXELS,
    image_area=(4 * 784, 1280 * 784),
    video_types=("Qwen2VLVideoProcessor", "Qwen2_5_VLVideoProcessor"),
    refused=("do_sample_frames", "cap_pixels_per_frame"),
)
_IMAGE_TYPES = (merged_processor_files.IMAGE_TYPE, "Qwen2_5_VLImageProcessor")


def reader(
    kind: type[QwenImageConfig],
) -> Callable[[ProcessorFiles, VLMConfig, ImageProcessorConfig | None], QwenImageConfig]:
    """Return `HFFormat.read_image_config` for settings of a kind: what the files say, over the stored settings."""

    def read(files: ProcessorFiles, config: VLMConfig, stored: ImageProcessorConfig | None) -> QwenImageConfig:
        image = stored if isinstance(stored, kind) else kind()
        if files.image is not None:
            image = merged_processor_files.read_images(image, files.image, config.encoder, _DEFAULTS, _IMAGE_TYPES)
        if files.video is not None:
            least, most = processor_files.edges(files.video, _VIDEO_AREA, area=True)
            why_not = merged_processor_files.why_no_videos(files.video, config.encoder, image, _DEFAULTS)
            image = dataclasses.replace(
                image,
                video_min_pixels=least,
                video_max_pixels=most,
                fps=files.video.number("fps", image.fps),
                no_videos=why_not or image.no_videos,
            )
        return image

    return read


def writer(processor_class: str) -> Callable[[VLMConfig, QwenImageConfig], dict[str, dict[str, Any]]]:
    """Return `HFFormat.write_image_config`, the inverse, for a processor of transformers."""

    def write(config: VLMConfig, image: QwenImageConfig) -> dict[str, dict[str, Any]]:
        return merged_processor_files.written(config.encoder, image, _DEFAULTS, processor_class, beside=True, video={})

    return write

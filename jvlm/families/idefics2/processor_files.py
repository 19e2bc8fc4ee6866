"""Processor files of Idefics2."""

from __future__ import annotations

import dataclasses
from typing import Any

from PIL import Image

from jvlm.data.image_processor import ImageProcessorConfig
from jvlm.families.idefics2.image_processor import Idefics2ImageConfig
from jvlm.models.vlm import VLMConfig
from jvlm.weights import processor_files
from jvlm.weights.processor_files import Pixels, ProcessorFiles

PIXELS = Pixels((0.5,) * 3, (0.5,) * 3, Image.Resampling.BILINEAR)


def read_image_config(
    files: ProcessorFiles, config: VLMConfig, stored: ImageProcessorConfig | None
) -> Idefics2ImageConfig:
    """Return what the files say, over the stored settings."""
    image = stored if isinstance(stored, Idefics2ImageConfig) else Idefics2ImageConfig()
    if files.processor is not None and files.processor.get("image_seq_len") is not None:
        files.processor.require("image_seq_len", 64, config.connector.latents)
    if files.image is None:
        return image
    files.image.require_type("image_processor_type", ("Idefics2ImageProcessor",))
    shortest, longest = processor_files.edges(files.image, (378, 980), area=False)
    processor_files.check_order(files.image, shortest, longest)
    pixels = processor_files.read_pixels(files.image, PIXELS)
    return dataclasses.replace(
        image,
        longest_edge=longest,
        shortest_edge=shortest,
        split=files.image.flag("do_image_splitting", False),  # transformers' own default
        resample=pixels.resample,
        resize=pixels.resize,
    )


def write_image_config(config: VLMConfig, image: Idefics2ImageConfig) -> dict[str, dict[str, Any]]:
    """Return the content of each processor file."""
    vit = config.encoder
    preprocessor = {
        **processor_files.write_pixels(Pixels(vit.image_mean, vit.image_std, image.resample, image.resize)),
        "do_image_splitting": image.split,
        "do_pad": True,
        "image_processor_type": "Idefics2ImageProcessor",
        "processor_class": "Idefics2Processor",
        "size": {"longest_edge": image.longest_edge, "shortest_edge": image.shortest_edge},
    }
    processor = {"image_seq_len": config.connector.latents, "processor_class": "Idefics2Processor"}
    return {processor_files.IMAGE: preprocessor, processor_files.PROCESSOR: processor}

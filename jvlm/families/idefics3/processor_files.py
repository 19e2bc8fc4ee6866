"""Processor files of Idefics3 and SmolVLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from PIL import Image

from jvlm.data.image_processor import ImageProcessorConfig
from jvlm.families.idefics3.image_processor import Idefics3ImageConfig
from jvlm.models.vlm import VLMConfig
from jvlm.weights import processor_files
from jvlm.weights.processor_files import Pixels, ProcessorFiles, Settings

PIXELS = Pixels((0.5,) * 3, (0.5,) * 3, Image.Resampling.LANCZOS)
# what transformers' image processor has where the files are silent
_LONGEST, _TILE, _TOKENS = 4 * 364, 364, 169


@dataclasses.dataclass(frozen=True)
class Form:
    """What the files of a family have of their own.

    Attributes:
      config: type of the settings.
      image_types: names of image processors; the first is written.
      processor: name of the processor.
      read_video: settings of videos, over those of images; None where there are none.
      write_video: the inverse: more of the file of images.
    """

    config: type[Idefics3ImageConfig]
    image_types: tuple[str, ...]
    processor: str
    read_video: Callable[[Any, Settings], Idefics3ImageConfig] | None = None
    write_video: Callable[[Any], dict[str, Any]] = lambda image: {}


IDEFICS3 = Form(Idefics3ImageConfig, ("Idefics3ImageProcessor",), "Idefics3Processor")


def longest(settings: Settings, key: str, default: int) -> int:
    """Return the longest edge that a size says. Raises UserError for another kind of size."""
    size = settings.get(key, {"longest_edge": default})
    value = size.get("longest_edge") if isinstance(size, dict) else None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        settings.refuse(key, "write an object with longest_edge, in pixels")
    return value


def reader(
    form: Form,
) -> Callable[[ProcessorFiles, VLMConfig, ImageProcessorConfig | None], Idefics3ImageConfig]:
    """Return `HFFormat.read_image_config`: what the files say, over the stored settings."""

    def read(files: ProcessorFiles, config: VLMConfig, stored: ImageProcessorConfig | None) -> Idefics3ImageConfig:
        image = stored if isinstance(stored, form.config) else form.config()
        if files.processor is not None and files.processor.get("image_seq_len") is not None:
            files.processor.require("image_seq_len", _TOKENS, config.connector.tokens_per_image)
        if files.image is not None:
            files.image.require_type("image_processor_type", form.image_types)
            pixels = processor_files.read_pixels(files.image, PIXELS)
            image = dataclasses.replace(
                image,
                longest_edge=longest(files.image, "size", _LONGEST),
                tile=longest(files.image, "max_image_size", _TILE),
                split=files.image.flag("do_image_splitting", True),
                resample=pixels.resample,
                resize=pixels.resize,
            )
        if files.video is not None and form.read_video is not None:
            image = form.read_video(image, files.video)
        return image

    return read


def writer(form: Form) -> Callable[[VLMConfig, Idefics3ImageConfig], dict[str, dict[str, Any]]]:
    """Return `HFFormat.write_image_config`, the inverse."""

    def write(config: VLMConfig, image: Idefics3ImageConfig) -> dict[str, dict[str, Any]]:
        vit = config.encoder
        tile = image.tile or vit.grid * vit.patch_size
        preprocessor = {
            **processor_files.write_pixels(Pixels(vit.image_mean, vit.image_std, image.resample, image.resize)),
            "do_image_splitting": image.split,
            "do_pad": True,
            "image_processor_type": form.image_types[0],
            "max_image_size": {"longest_edge": tile},
            "processor_class": form.processor,
            "size": {"longest_edge": image.longest_edge or 4 * tile},
            **form.write_video(image),
        }
        processor = {"image_seq_len": config.connector.tokens_per_image, "processor_class": form.processor}
        return {processor_files.IMAGE: preprocessor, processor_files.PROCESSOR: processor}

    return write

"""Processor files of families whose patches are merged: `jvlm.data.merged_images`."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from jvlm.data.merged_images import MergedImageConfig
from jvlm.models.encoders.native_vit import NativeViTConfig
from jvlm.weights import processor_files
from jvlm.weights.processor_files import Pixels, Settings

T = TypeVar("T", bound=MergedImageConfig)
PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}  # what transformers has where files are silent
IMAGE_TYPE = "Qwen2VLImageProcessor"


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What transformers' processors have where the files are silent.

    Attributes:
      pixels: of images and videos.
      image_area: (least, most) pixels of an image.
      video_types: names of video processors; the first is the default, and is written.
      video_patch_size: side of a patch of videos.
      refused: flags of video processors that change frames as jvlm does not.
    """

    pixels: Pixels
    image_area: tuple[int, int]
    video_types: tuple[str, ...]
    video_patch_size: int = 14
    refused: tuple[str, ...] = ()


def measures(vit: NativeViTConfig) -> dict[str, int]:
    """Return the processors' names of the tower's measures."""
    sizes = (vit.patch_size, vit.temporal_patch_size, vit.spatial_merge_size)
    return dict(zip(PATCHES, sizes, strict=True))


def read_images(
    image: T, settings: Settings, vit: NativeViTConfig, defaults: Defaults, types: tuple[str, ...] = (IMAGE_TYPE,)
) -> T:
    """Return what an image processor's settings say, over the stored ones. Raises UserError for what does not fit."""
    settings.require_type("image_processor_type", types)
    for key, size in measures(vit).items():
        settings.require(key, PATCHES[key], size)
    pixels = processor_files.read_pixels(settings, defaults.pixels)
    least, most = processor_files.edges(settings, defaults.image_area, area=True)
    processor_files.check_order(settings, least, most)
    return dataclasses.replace(image, min_pixels=least, max_pixels=most, resample=pixels.resample, resize=pixels.resize)


def why_no_videos(video: Settings, vit: NativeViTConfig, image: MergedImageConfig, defaults: Defaults) -> str:
    """Return what keeps videos from being made as these settings say; one pixel rule serves images and videos here."""
    wanted = dataclasses.asdict(processor_files.read_pixels(video, defaults.pixels))
    here = {"mean": vit.image_mean, "std": vit.image_std, "resample": image.resample, "resize": image.resize}
    patches = {**PATCHES, "patch_size": defaults.video_patch_size}
    wanted |= {key: video.get(key, size) for key, size in patches.items()}
    here |= measures(vit)
    kind = video.get("video_processor_type", defaults.video_types[0])
    lines = [f"{key} of videos is {wanted[key]}, of images {here[key]}" for key in here if wanted[key] != here[key]]
    lines += [f"{key} is on" for key in defaults.refused if video.get(key)]
    lines += [f"video_processor_type is {kind}"] if kind not in defaults.video_types else []
    return f"{video.source}: {'; '.join(lines)}; jvlm cannot do this" if lines else ""


def written(
    vit: NativeViTConfig,
    image: MergedImageConfig,
    defaults: Defaults,
    processor_class: str,
    *,
    beside: bool,
    video: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return the content of each processor file.

    Args:
      beside: write ``min_pixels`` and ``max_pixels`` beside ``size``, which older versions of transformers read.
      video: what else the file of videos has.
    """
    common = {
        **processor_files.write_pixels(Pixels(vit.image_mean, vit.image_std, image.resample, image.resize)),
        **measures(vit),
        "processor_class": processor_class,
    }

    def area(least: int, most: int) -> dict[str, Any]:
        size = {"size": {"shortest_edge": least, "longest_edge": most}}
        return {"min_pixels": least, "max_pixels": most, **size} if beside else size

    images = {**common, **area(image.min_pixels, image.max_pixels), "image_processor_type": IMAGE_TYPE}
    videos = {**common, **area(image.video_min_pixels, image.video_max_pixels), "fps": image.fps, **video}
    videos["video_processor_type"] = defaults.video_types[0]
    return {processor_files.IMAGE: images, processor_files.VIDEO: videos}

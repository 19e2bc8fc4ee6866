"""Processor files of SmolVLM2: Idefics3's, with how videos are sampled."""

from __future__ import annotations

import dataclasses
from typing import Any

from jvlm.families.idefics3.processor_files import Form, longest
from jvlm.families.smolvlm.video import SmolVLMImageConfig
from jvlm.weights.processor_files import Settings


def read_video(image: SmolVLMImageConfig, video: Settings) -> SmolVLMImageConfig:
    """Return the settings with those of videos: under "video_sampling", or as transformers 5 writes them."""
    inner = video.get("video_sampling")
    sampling = video if inner is None else Settings(inner, f"{video.source}, video_sampling")
    # transformers lets a size beside video_sampling replace the one inside
    size = longest(video, "size", 4 * 364) if video.get("size") else longest(sampling, "video_size", 4 * 364)
    return dataclasses.replace(
        image,
        fps=sampling.number("fps", image.fps),
        max_frames=int(sampling.number("max_frames" if inner else "num_frames", image.max_frames)),
        video_longest_edge=size,
    )


def write_video(image: SmolVLMImageConfig) -> dict[str, Any]:
    """Return the inverse."""
    sampling: dict[str, Any] = {"fps": image.fps, "max_frames": image.max_frames}
    if image.video_longest_edge is not None:
        sampling["video_size"] = {"longest_edge": image.video_longest_edge}
    return {"video_sampling": sampling}


SMOLVLM = Form(
    SmolVLMImageConfig,
    ("SmolVLMImageProcessor", "Idefics3ImageProcessor"),
    "SmolVLMProcessor",
    read_video,
    write_video,
)

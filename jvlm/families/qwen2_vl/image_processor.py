"""Images and videos of Qwen2-VL: as Qwen2.5-VL's, without windows, and without a clock for videos."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from jvlm.data.image_processor import MediaPatches
from jvlm.data.merged_images import MergedImageProcessor
from jvlm.families.qwen2_5_vl.image_processor import QwenImageConfig

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig


@dataclasses.dataclass(frozen=True)
class Qwen2ImageConfig(QwenImageConfig, tag="qwen2_vl"):
    """The same limits as Qwen2.5-VL's, and frames by the same rule, that of qwen-vl-utils."""

    def build(self, model: VLMConfig) -> Qwen2ImageProcessor:
        """Return the image processor of a model."""
        return Qwen2ImageProcessor(model)


class Qwen2ImageProcessor(MergedImageProcessor):
    """Temporal patches of a video are numbered, however far apart they are in time."""

    def video(
        self, frames: Sequence[Image.Image], limits: Qwen2ImageConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Return a video; an incomplete last temporal patch repeats the last frame."""
        return dataclasses.replace(super().video(frames, limits, times), temporal_step=1.0)

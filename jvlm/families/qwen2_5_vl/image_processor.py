"""Images and videos of Qwen2.5-VL and MiMo-VL: patches in window order, and a clock for the frames of videos."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from jvlm.data.image_processor import Limit, MediaPatches
from jvlm.data.merged_images import MergedImageConfig, MergedImageProcessor
from jvlm.data.video.frame_times import with_times
from jvlm.data.video.sampling import PATCH_AREA, FramePixels, Sampling
from jvlm.families.qwen2_5_vl.chat_format import CHAT_FORMAT

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig


@dataclasses.dataclass(frozen=True)
class QwenImageConfig(MergedImageConfig, tag="qwen2_5_vl"):
    """Limits of the resize in pixels, and the frame rate of videos.

    The defaults are Qwen2.5-VL's: 4 to 16,384 tokens an image; 128 to 768 tokens a frame at 2 frames a second.

    Attributes:
      video_max_frames: most frames of a video file.
      video_max_tokens: most tokens of a video, kept however long it is; None has qwen-vl-utils' limit, which long
        videos exceed, since each frame gets ``video_min_pixels`` at least. MiMo-VL has 16,384, with 256 frames. A token
        is 28 x 28 pixels of two frames here, whatever the encoder's patches are.
      video_times: write the time of each temporal patch of a video before it, as Qwen3-VL does: "<1.2 seconds>". Each
        is then an image by itself, and M-RoPE does not know its time.
    """

    limits: ClassVar[dict[str, Limit]] = {
        **MergedImageConfig.limits,
        "video_max_frames": Limit(2, help="most frames of a video file"),
    }
    bounds: ClassVar[dict[str, str]] = {
        **MergedImageConfig.bounds,
        "video_max_frames": "[2, inf)",
        "video_max_tokens": "[1, inf)",
    }

    video_max_frames: int = 768
    video_max_tokens: int | None = None
    video_times: bool = False

    def sampling(self) -> Sampling:
        """Return the rule of qwen-vl-utils at ``fps``."""
        return Sampling(fps=self.fps, max_frames=self.video_max_frames, min_frames=min(4, self.video_max_frames))

    def for_video(self, frames: int, fps: float, *, is_resized: bool) -> QwenImageConfig:
        """Return the settings with the video's rate, and with less for each frame the more frames there are."""
        pixels = {"min_pixels": self.video_min_pixels, "max_pixels": self.video_max_pixels}
        if self.video_max_tokens is not None:
            pixels |= {"total_pixels": self.video_max_tokens * PATCH_AREA, "is_hard": True}
        least, most = FramePixels(**pixels).limits(frames)
        area = {"video_min_pixels": min(least, int(most)), "video_max_pixels": int(most)}
        if self.video_max_tokens is None:
            del area["video_min_pixels"]
        return dataclasses.replace(super().for_video(frames, fps, is_resized=is_resized), **area)

    def build(self, model: VLMConfig) -> QwenImageProcessor:
        """Return the image processor of a model."""
        return QwenImageProcessor(model)


class QwenImageProcessor(MergedImageProcessor):
    """Patches in the order of attention windows."""

    def __init__(self, model: VLMConfig):
        super().__init__(model)
        self.window = self.config.window_size // self.factor

    def video(
        self, frames: Sequence[Image.Image], limits: QwenImageConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Return a video of frames at ``limits.fps``, whose temporal position ids count time."""
        media, pair = super().video(frames, limits, times), self.config.temporal_patch_size
        if limits.video_times:
            given = {"frames": len(frames), "fps": limits.fps, "pair": pair}
            return with_times(media, times, **given, start=CHAT_FORMAT.media_prefix, end=CHAT_FORMAT.media_suffix)
        seconds = pair / limits.fps
        return dataclasses.replace(media, temporal_step=seconds * self.config.tokens_per_second)

"""Videos of SmolVLM2: frames as whole images behind their times, and words before and after them."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image

from jvlm.data.image_processor import Limit, MediaPatches
from jvlm.data.video.sampling import SampledIndices, Sampling
from jvlm.errors import UserError
from jvlm.families.idefics3.image_processor import FAKE, GLOBAL, Idefics3ImageConfig, Idefics3ImageProcessor
from jvlm.validation import check_fields

if TYPE_CHECKING:
    from jvlm.models.vlm import VLMConfig

_SKIPPED = 1.0  # s at both ends of a long video
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


@dataclasses.dataclass(frozen=True)
class SmolVLMSampling(Sampling):
    """At most ``max_frames`` at ``fps``, from the first frame to the last; of a long video, without its ends."""

    def by_number(self, total: int, fps: float) -> SampledIndices:
        """Return the frames that transformers' ``SmolVLMVideoProcessor`` takes.

        Raises:
          UserError: an empty part.
        """
        if self.num_frames is not None or self.start is not None or self.end is not None:
            return super().by_number(total, fps)
        duration, last = total / fps, total - 1
        count = max(min(round(self.fps * duration), self.max_frames), 1)
        first, stop = 0, last
        if duration - 2 * _SKIPPED > self.max_frames * self.fps:
            first, stop = int(_SKIPPED * fps), min(int(total - _SKIPPED * fps), last)
        if first >= stop:
            first, stop = 0, last
        chosen = np.unique(np.linspace(first, stop, count, dtype=int))
        return SampledIndices(tuple(int(i) for i in chosen), len(chosen) / duration)


@dataclasses.dataclass(frozen=True)
class SmolVLMImageConfig(Idefics3ImageConfig, tag="smolvlm"):
    """Images as Idefics3's.

    Attributes:
      fps: frames a second: taken of a video file, and assumed of a list of frames that does not say its own.
      max_frames: most frames of a video file.
      video_longest_edge: longer side of a frame after the first resize; None is that of images. The second makes it a
        tile.
    """

    limits: ClassVar[dict[str, Limit]] = {
        **Idefics3ImageConfig.limits,
        "fps": Limit(1e-4, 1e4, whole=False, help="frames a second of a video"),
        "max_frames": Limit(most=999, help="most frames of a video file"),
    }

    fps: float = 1.0
    max_frames: int = 64
    video_longest_edge: int | None = None

    def __post_init__(self):
        super().__post_init__()
        bounds = {"fps": "(0, inf)", "max_frames": "[1, 999]", "video_longest_edge": "[1, inf)"}
        check_fields(self, "processor.image.", {"resample": "[0, 5]", **bounds})

    def sampling(self) -> SmolVLMSampling:
        """Return the rule of transformers' video processor."""
        return SmolVLMSampling(fps=self.fps, min_frames=1, max_frames=self.max_frames, pairs=False)

    def for_video(self, frames: int, fps: float, *, is_resized: bool) -> SmolVLMImageConfig:
        """Return the settings with the video's rate."""
        return dataclasses.replace(self, fps=fps)

    def build(self, model: VLMConfig) -> SmolVLMImageProcessor:
        """Return the image processor of a model."""
        return SmolVLMImageProcessor(model, self)


class SmolVLMImageProcessor(Idefics3ImageProcessor):
    """Images as Idefics3's; a video says its length, and the time of each frame."""

    def video(
        self, frames: Sequence[Image.Image], config: SmolVLMImageConfig, times: Sequence[float] | None = None
    ) -> MediaPatches:
        """Return a video of frames at ``config.fps``, each as one tile."""
        resized = dataclasses.replace(config, longest_edge=config.video_longest_edge or config.longest_edge)
        media = super().video(frames, resized, times)
        if times is None:
            times = [number / config.fps for number in range(len(frames))]
        # a hair more, since the quotient of whole seconds may lie below them
        length = datetime.timedelta(seconds=int(len(frames) / config.fps + 1e-6))
        shown = [f"\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:" for time in times]
        intro = (
            f"You are provided the following series of {number_in_words(len(frames))} frames from a {length} "
            f"[H:MM:SS] video.\n{shown[0]}"
        )
        pattern: list[str | int] = [FAKE + GLOBAL, self.features]
        for words in shown[1:]:
            pattern += [f"{FAKE}{words}{FAKE}{GLOBAL}", self.features]
        return dataclasses.replace(media, token_pattern=(*pattern, FAKE), leading_text=intro, trailing_text="\n\n")


def number_in_words(number: int) -> str:
    """Return a number in English: 21 is "twenty-one", 105 "one hundred and five".

    Raises:
      UserError: a number above 999.
    """
    if number > 999:
        raise UserError(f"a video of {number} frames: 999 are the most that its description can count")
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" and {number_in_words(rest)}" if rest else "")

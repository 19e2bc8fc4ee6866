"""The settings of decoding video files. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jvlm.validation import check_fields

OnDamaged = Literal["error", "keep"]


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """How video files are decoded. Which frames are taken is a setting of the image processor, and of each video.

    Attributes:
      processes: that decode, of each process that reads data.
      seconds: that a video may take; its process is then killed, and the example is bad.
      seconds_per_second: how much more for each second of it, or for each frame where they are fewer.
      on_damaged: "error" refuses a video with an error in it, "keep" takes what comes before the error if that is 90 %
        of the duration.
    """

    processes: int = 4
    seconds: float = 30.0
    seconds_per_second: float = 2.0
    on_damaged: OnDamaged = "error"

    def __post_init__(self):
        check_fields(
            self, "data.video.", {"processes": "[1, inf)", "seconds": "(0, inf)", "seconds_per_second": "[0, inf)"}
        )

"""The settings of documents: examples without turns and without a chat template. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jvlm.validation import check_fields


@dataclasses.dataclass(frozen=True)
class DocumentConfig:
    """How documents are read.

    Attributes:
      cut: what becomes of a document that does not fit a sequence, or has more than ``max_images`` images. "split": it
        is cut between pieces (blocks; where one text alone is too long, between its paragraphs or else its words), and
        what is left becomes another document. "sample_window": the part that fits from a random piece on, drawn anew
        each epoch, is trained on, the rest is not. "never": it is not cut, and `DataConfig.on_too_long` applies.
      max_images: most images and videos of a document; None is no limit. MM1 takes 16.
      window_bonus: with ``cut`` "sample_window", a piece before which an image stands next is more likely to begin the
        window, by this much: the weight of such pieces is 1 more than this, that of others 1. Idefics2's code takes 2.
    """

    cut: Literal["split", "sample_window", "never"] = "split"
    max_images: int | None = None
    window_bonus: float = 2.0

    def __post_init__(self):
        check_fields(self, "data.documents.", {"max_images": "[1, inf)", "window_bonus": "[0, inf)"})

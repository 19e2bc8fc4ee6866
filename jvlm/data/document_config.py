"""The settings of documents: examples without turns and without a chat template. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jvlm.validation import check_fields


@dataclasses.dataclass(frozen=True)
class DocumentConfig:
    """How documents are read: pages with images, captions, text alone.

    Attributes:
      cut: what becomes of a document that does not fit a sequence, or has more than ``max_images`` images. "split": it
        is cut between pieces (blocks; where one text alone is too long, between its paragraphs or else its words), and
        what is left becomes another document. "sample_window": the part that fits from a random piece on, drawn anew
        each epoch, is trained on, the rest is not. "never": it is not cut, and `DataConfig.on_too_long` applies.
      max_images: most images and videos of a document; None is no limit. MM1 takes 16.
      window_bonus: with ``cut`` "sample_window", a piece that is an image, or has one behind it, is more likely to
        begin the window: its weight is 1 more than this, that of others 1. Idefics2's code takes 2.
      join: so many documents, one after the other in the order of training and of one source, share a segment, in which
        tokens see those of earlier documents, as in Idefics2's code; as many of them as fit a sequence. Documents that
        were cut stay alone.
      max_images_in_a_row: leave documents out in which more images than this follow one another without words between;
        Idefics2 takes 2. Here and below, None is no limit, and what is left out is counted and listed.
      max_images_at_end: leave documents out that end with more images than this; Idefics2 takes 1.
      min_image_side: leave documents out with an image that has a shorter side, in pixels.
      max_image_aspect: leave documents out with an image whose longer side is more than so many times the shorter one.
    """

    cut: Literal["split", "sample_window", "never"] = "split"
    max_images: int | None = None
    window_bonus: float = 2.0
    join: int = 1
    max_images_in_a_row: int | None = None
    max_images_at_end: int | None = None
    min_image_side: int | None = None
    max_image_aspect: float | None = None

    def __post_init__(self):
        counts = dict.fromkeys(("max_images", "join", "max_images_in_a_row", "min_image_side"), "[1, inf)")
        bounds = {"window_bonus": "[0, inf)", "max_images_at_end": "[0, inf)", "max_image_aspect": "[1, inf)"}
        check_fields(self, "data.documents.", counts | bounds)

"""Documents that a run leaves out by rule."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from jvlm.data.boxes import Sizes
from jvlm.data.content import Document, Image, Text, Video
from jvlm.data.document_config import DocumentConfig
from jvlm.data.errors import SkippedError


def check_order(document: Document, config: DocumentConfig) -> None:
    """Raise SkippedError for more images in a row, or at the end, than the configuration allows."""
    runs = [
        (is_media, len(list(pieces)))
        for is_media, pieces in itertools.groupby(
            isinstance(part, Image | Video)
            for part in document.content
            if not (isinstance(part, Text) and not part.text.strip())
        )
    ]
    longest = max((count for is_media, count in runs if is_media), default=0)
    if config.max_images_in_a_row is not None and longest > config.max_images_in_a_row:
        _skip(document, f"{longest} images in a row", "max_images_in_a_row", config.max_images_in_a_row)
    last = runs[-1][1] if runs and runs[-1][0] else 0
    if config.max_images_at_end is not None and last > config.max_images_at_end:
        _skip(document, f"{last} images at its end", "max_images_at_end", config.max_images_at_end)


def check_sizes(document: Document, sizes: Sequence[Sizes], config: DocumentConfig) -> None:
    """Raise SkippedError for an image that is smaller, or longer for its width, than the configuration allows."""
    for size in sizes:
        width, height = size.original
        if config.min_image_side is not None and min(width, height) < config.min_image_side:
            _skip(document, f"an image of {width} x {height} pixels", "min_image_side", config.min_image_side)
        if config.max_image_aspect is not None and max(width, height) > config.max_image_aspect * min(width, height):
            _skip(document, f"an image of {width} x {height} pixels", "max_image_aspect", config.max_image_aspect)


def _skip(document: Document, what: str, rule: str, limit: float) -> None:
    raise SkippedError(document.origin, "document", what, f"Left out by data.documents.{rule} {limit:g}")


def without_drawing(config: DocumentConfig) -> DocumentConfig:
    """Return the settings with which a document is read whole, in parts, and alike each time: for validation."""
    return dataclasses.replace(config, cut="never" if config.cut == "never" else "split", join=1)

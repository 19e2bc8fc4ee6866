"""Looking at data before training on it, and writing shards that carry their pictures."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvlm.data.errors import RowError
from jvlm.data.images import open_image
from jvlm.data.processor import Processor
from jvlm.data.rows import parse_row
from jvlm.data.sharding import shard
from jvlm.data.shards import RowSource
from jvlm.progress import Progress

__all__ = ["CheckReport", "check", "shard"]


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What a check found: rows that can be used, those that cannot and why, and token counts if they were made."""

    rows: int
    rejected: tuple[RowError, ...]
    tokens: tuple[int, ...]
    media_tokens: tuple[int, ...]

    def text(self) -> str:
        """For the terminal: counts, percentiles, then every rejected row."""
        lines = [f"{self.rows - len(self.rejected)} of {self.rows} rows can be used"]
        for name, values in (("tokens", self.tokens), ("media tokens", self.media_tokens)):
            if values:
                marks = ", ".join(f"{p} % {np.percentile(values, p):.0f}" for p in (0, 50, 90, 99, 100))
                lines.append(f"{name} of a row: {marks}; {sum(values):,} in all")
        if self.rejected:
            reasons = Counter(error.field for error in self.rejected)
            lines.append("rejected by field: " + ", ".join(f"{field} {n}" for field, n in reasons.most_common()))
            lines += [f"  {error}" for error in self.rejected]
        return "\n".join(lines)


def check(files: Sequence[str], processor: Processor | None) -> CheckReport:
    """Read every row and its media as training would.

    Args:
      processor: also counts tokens; without one, rows are checked and pictures decoded only.
    """
    source = RowSource(files)
    rejected, tokens, media = [], [], []
    for index in Progress(range(len(source)), desc="checking", unit="row"):
        origin, row = source[index]
        try:
            if isinstance(row, RowError):
                raise row
            conversation = parse_row(row, origin)
            if processor is None:
                roots = (str(Path(origin.file).parent),)
                for field, picture in _pictures(conversation):
                    open_image(picture, origin=origin, field=field, roots=roots)
            else:
                example = processor.encode(conversation)
                tokens.append(example.length)
                media.append(int((example.vision_index >= 0).sum()))
        except RowError as error:
            rejected.append(error)
    return CheckReport(len(source), tuple(rejected), tuple(tokens), tuple(media))


def _pictures(conversation) -> Iterator[tuple[str, Any]]:
    for i, image in enumerate(conversation.images):
        yield f"images[{i}]", image
    for i, frames in enumerate(conversation.videos):
        for frame in frames:
            yield f"videos[{i}]", frame

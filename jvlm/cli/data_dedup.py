"""``jvlm data dedup``: duplicates found, listed, and left out."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jvlm.cli.data_prepare import Prepared
from jvlm.options import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataDedup(Prepared):
    """Find duplicates of earlier examples: equal ones, near images, near texts. Without --drop it only looks.

    Attributes:
      against: files that come before all others: what is in them is found, and they are not written.
      drop: kinds to leave out. equal: the same words and media; near: the same words, near images; near_text: nearly
        the same words, no images; near_images: near images, other words.
      hash_bits: of the perceptual hash of images: 256, or 64 for photos alone.
      max_distance: most bits in which the hashes of near images differ; 24 of 256, 8 of 64 without it.
      least_jaccard: least share of runs of five words that near texts have in common.
      most_compared: most earlier examples that one is compared with; pairs beyond are counted.
    """

    against: tuple[str, ...] = ()
    drop: tuple[Literal["equal", "near", "near_text", "near_images"], ...] = ()
    hash_bits: Literal[64, 256] = 256
    max_distance: int | None = None
    least_jaccard: float = 0.8
    most_compared: int = 64


def run(words: list[str]) -> int:
    options = parse(DataDedup, words, "jvlm data dedup")

    from jvlm.data.prepare.dedup import Likeness, dedup
    from jvlm.data.prepare.image_hash import MAX_DISTANCE

    distance = MAX_DISTANCE[options.hash_bits] if options.max_distance is None else options.max_distance
    likeness = Likeness(options.hash_bits, distance, options.least_jaccard, options.most_compared)
    done = dedup(
        options.files,
        options.output,
        against=options.against,
        drop=options.drop,
        likeness=likeness,
        **options.shared(),
    )
    print(done.text())
    return 0

"""``jvlm data decontaminate``: examples of evaluation sets found in training data, and left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from jvlm.cli.data_prepare import Prepared
from jvlm.errors import UserError
from jvlm.options import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataDecontaminate(Prepared):
    """Find examples of evaluation sets in training data, by words and by images. Without --drop it only looks.

    Attributes:
      evaluation: evaluation sets, each NAME=FILE or FILE; several files of one name are one set.
      drop: what to leave examples out for.
      ngram_words: words of a run that a text shares with a question or an answer.
      least_words: shorter questions and answers are not looked for; they are counted.
      most_items: a run of words of more items of a set than this is a phrase, and is not looked for.
      max_distance: most bits of 256 in which the hashes of near images differ.
    """

    evaluation: tuple[str, ...]
    drop: tuple[Literal["text", "image"], ...] = ()
    ngram_words: int = 13
    least_words: int = 8
    most_items: int = 10
    max_distance: int = 24


def named_sets(words: tuple[str, ...]) -> dict[str, list[str]]:
    """Return name -> files of NAME=FILE or FILE, whose name is then the file's. Raises UserError for an empty one."""
    sets: dict[str, list[str]] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if not equals:
            name, file = Path(word).stem, word
        if not name or not file:
            raise UserError(f"--evaluation {word}: give NAME=FILE, or FILE")
        sets.setdefault(name, []).append(file)
    return sets


def run(words: list[str]) -> int:
    options = parse(DataDecontaminate, words, "jvlm data decontaminate")

    from jvlm.data.prepare.decontaminate import Contamination, decontaminate

    rule = Contamination(
        options.ngram_words, options.least_words, options.most_items, max_distance=options.max_distance
    )
    done = decontaminate(
        options.files,
        options.output,
        named_sets(options.evaluation),
        drop=options.drop,
        rule=rule,
        **options.shared(),
    )
    print(done.text())
    return 0

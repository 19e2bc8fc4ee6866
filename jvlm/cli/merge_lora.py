"""``jvlm merge-lora``: an adapter added to its base, with ms-swift's arguments."""

from __future__ import annotations

import sys

from jvlm.swift import words as swift_words
from jvlm.swift.export_arguments import MergeArguments


def run(words: list[str]) -> int:
    parsed = swift_words.parse(MergeArguments, words, "jvlm merge-lora")
    for note in parsed.notes:
        print(f"jvlm: {note}", file=sys.stderr)
    from jvlm.swift.export import merge

    merge(parsed.arguments)
    return 0

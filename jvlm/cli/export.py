"""``jvlm export``: a checkpoint merged, quantised, checked or uploaded, with ms-swift's arguments."""

from __future__ import annotations

import os
import sys

from jvlm.swift import words as swift_words
from jvlm.swift.export_arguments import ExportArguments
from jvlm.swift.other_names import environment_notes


def run(words: list[str]) -> int:
    parsed = swift_words.parse(ExportArguments, words, "jvlm export")
    for note in (*environment_notes(os.environ), *parsed.notes):
        print(f"jvlm: {note}", file=sys.stderr)
    from jvlm.swift.export import export

    export(parsed.arguments)
    return 0

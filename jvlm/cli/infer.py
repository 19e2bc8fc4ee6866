"""``jvlm infer``: answers of a model or of a checkpoint, with ms-swift's arguments."""

from __future__ import annotations

import io
import os
import sys

from jvlm.swift import words as swift_words
from jvlm.swift.infer_arguments import InferArguments
from jvlm.swift.other_names import environment_notes


def run(words: list[str]) -> int:
    parsed = swift_words.parse(InferArguments, words, "jvlm infer")
    for note in (*environment_notes(os.environ), *parsed.notes):
        print(f"jvlm: {note}", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the conversation says what is wrong with a line
    from jvlm.swift.infer import infer

    infer(parsed.arguments)
    return 0

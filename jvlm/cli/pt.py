"""``jvlm pt``: training on all tokens of conversations, with ms-swift's arguments."""

from __future__ import annotations

from jvlm.cli.sft import Pt, train


def run(words: list[str], *, show_traceback: bool = False) -> int:
    return train(Pt, "pt", words, show_traceback=show_traceback)

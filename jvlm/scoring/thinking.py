"""The form of a reasoned answer."""

from __future__ import annotations

from jvlm.scoring.score import Score


def thinking_format(text: str, *, thinking_opened: bool = False) -> Score:
    """Return 1 for one closed ``<think>`` part at the beginning and an answer after it.

    Meant as a gate (a broken form earns nothing), not as a bonus: a model picks that up first, which hides that
    answers get worse.

    Args:
      thinking_opened: whether the prompt ended with an opened ``<think>``, which the text then lacks.
    """
    before, opened, rest = ("", "<think>", text) if thinking_opened else text.partition("<think>")
    _, closed, content = rest.partition("</think>")
    whole = opened and closed and not before.strip() and content.strip()
    once = "<think>" not in rest and "</think>" not in content
    return Score(1.0) if whole and once else Score(0.0, "wrong_format")

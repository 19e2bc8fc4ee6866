"""The thinking of a model, told apart from its answer while both arrive in pieces of any size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"
Piece = tuple[Literal["reasoning", "content"], str]


def held_back(text: str, tag: str) -> int:
    """Return how many last characters of a text may be the beginning of a tag."""
    most = min(len(text), len(tag) - 1)
    return next((n for n in range(most, 0, -1) if tag.startswith(text[-n:])), 0)


class ReasoningSplitter:
    """Splits generated text at `<think>` and `</think>`.

    Thinking is at the beginning or not at all; what is never closed is all thinking. White space around the tags
    belongs to neither part.

    Args:
      begins_inside: the prompt ends with an open `<think>`.
    """

    def __init__(self, *, begins_inside: bool):
        self._state: Literal["start", "inside", "after", "content"] = "inside" if begins_inside else "start"
        self._held, self._fresh = "", True

    @property
    def thinking(self) -> bool:
        """Whether what comes next is thinking, as far as is known."""
        return self._state == "inside"

    def feed(self, text: str) -> list[Piece]:
        """Return what can be told of a further piece."""
        self._held += text
        return [piece for piece in self._take() if piece[1]]

    def finish(self) -> list[Piece]:
        """Return what was held back, at the end."""
        text, self._held = self._held, ""
        if self._state == "inside":
            text = text.rstrip()
            return [("reasoning", text.lstrip() if self._fresh else text)] if text else []
        return [("content", text)] if text and self._state != "after" else []

    def _take(self) -> Iterator[Piece]:
        if self._state == "start":
            words = self._held.lstrip()
            if words.startswith(OPEN):
                self._state, self._held = "inside", words[len(OPEN) :]
            elif OPEN.startswith(words):
                return
            else:
                self._state = "content"
        if self._state == "inside":
            if self._fresh:
                self._held = self._held.lstrip()
            before, found, behind = self._held.partition(CLOSE)
            if found:
                self._state, self._held = "after", behind
                yield "reasoning", before.rstrip()
            else:
                # white space at the end may stand before the closing tag
                kept = len(before) - held_back(before, CLOSE)
                kept = len(before[:kept].rstrip())
                self._held = before[kept:]
                self._fresh = self._fresh and not kept
                yield "reasoning", before[:kept]
        if self._state == "after":
            self._held = self._held.lstrip()
            if not self._held:
                return
            self._state = "content"
        if self._state == "content":
            text, self._held = self._held, ""
            yield "content", text

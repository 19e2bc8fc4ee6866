"""Token ids to text while they arrive."""

from __future__ import annotations

from jvlm.data.processor import Processor

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns ids into pieces of text that join up to the text of all of them, never cutting a character.

    Only the last few ids are decoded again for a new one: those whose text may change its neighbour's.
    """

    def __init__(self, processor: Processor):
        self.processor = processor
        self.ids: list[int] = []
        self._context, self._sent = 0, 0

    def add(self, token: int) -> str:
        """The text that the token completes; empty while a character is not whole."""
        self.ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """What is left, broken characters included."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self.processor.decode(self.ids[self._context : self._sent])
        text = self.processor.decode(self.ids[self._context :])
        if text.endswith(_BROKEN) and not final:
            return ""
        self._context, self._sent = self._sent, len(self.ids)
        return text[len(before) :]

"""Token ids to text while they arrive."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from jvlm.data.processor import Processor

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
# Before such a space nothing that transformers' `clean_up_tokenization` replaces can reach over to the text behind it:
# its patterns begin with a space, and hold another one only after an apostrophe; " n" may become part of " n't".
_SAFE_CUT = re.compile(r"(?<![ '])(?<! n) ")


class TextStream:
    """Turns ids into pieces of text that join up to the text of all of them, never cutting a character.

    Only the last few ids are decoded again for a new one. What later ids may still change is held back: characters
    that are not whole, runs of byte tokens (one bad byte spoils the whole run), and the last word where the tokenizer
    removes spaces before punctuation.

    Args:
      special: leave special tokens in the text.
    """

    def __init__(self, processor: Processor, *, special: bool = False):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.ids: list[int] = []
        self._keeps_special = special
        added = () if special else self.tokenizer.added_tokens_decoder.values()
        self._special = {token.content for token in added if token.special}
        self._cleans = None if self.tokenizer.clean_up_tokenization_spaces else False
        # ids that are not left out; text of those before `_settled` is final, and decoding begins at `_context`
        self._written: list[int] = []
        self._context = self._settled = 0
        self._held, self._given = "", 0

    def add(self, token: int) -> str:
        """The text that the token completes; empty while it may still change."""
        return self.extend((token,))

    def extend(self, tokens: Iterable[int]) -> str:
        """The text that tokens complete, which costs as much as that of one."""
        name = None
        for token in tokens:
            self.ids.append(token)
            found = self.tokenizer.convert_ids_to_tokens(token)
            if found is not None and found not in self._special:
                self._written.append(token)
                name = found
        if name is None or _BYTE.fullmatch(name):
            return ""
        before = self._decode(self._context, self._settled)
        text = self._decode(self._context, len(self._written))
        if text.endswith(_BROKEN) or not text.startswith(before):
            return ""
        # decoders treat the beginning of a text apart: the next context must have a beginning of its own
        if self._decode(self._settled, len(self._written)):
            self._context = self._settled
        self._settled = len(self._written)
        return self._give(text[len(before) :])

    def hold(self, tokens: Sequence[int]) -> str:
        """Nothing yet: `finish` gives the text. Nothing but such tokens and the end may follow."""
        self.ids += tokens
        return ""

    def finish(self) -> str:
        """What is left, broken characters included."""
        text = self.tokenizer.decode(self.ids) if self._keeps_special else self.processor.decode(self.ids)
        piece = text[self._given :]
        self._given += len(piece)
        return piece

    def _decode(self, start: int, end: int) -> str:
        ids = self._written[start:end]
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""

    def _give(self, text: str) -> str:
        if self._cleans is not False:
            text = self._cleaned(self._held + text)
        self._given += len(text)
        return text

    def _cleaned(self, text: str) -> str:
        """What can be given of a text from which the tokenizer removes spaces; holds the rest."""
        cuts = [match.start() for match in _SAFE_CUT.finditer(text)]
        cut = cuts[-1] if cuts else 0
        cleaned = self.tokenizer.clean_up_tokenization(text[:cut])
        if self._cleans is None and cleaned != text[:cut]:
            # some versions of transformers ignore the setting for some tokenizers: see what this one does
            self._cleans = self.tokenizer.decode(self._written) != self._decode(0, len(self._written))
            if not self._cleans:
                cut, cleaned = len(text), text
        self._held = text[cut:]
        return cleaned

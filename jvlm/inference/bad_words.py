"""Words that may not come in an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from jvlm.errors import UserError
from jvlm.inference.constrain import GrammarError, TokenConstraint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def word_tokens(words: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each word, as it begins a text and as it follows a space.

    Raises:
      UserError: a word of which the tokenizer makes no token.
    """
    found = []
    for word in words:
        for text in (word, f" {word.lstrip()}"):
            tokens = tuple(tokenizer.encode(text, add_special_tokens=False))
            if not tokens:
                raise UserError(f"sampling.bad_words has {word!r}, which has no token; leave it out")
            found.append(tokens)
    return tuple(dict.fromkeys(found))


class BadWords:
    """Forbids the last token of a word where the tokens before it have just come in the answer.

    What is forbidden are the tokens that the tokenizer makes of a word, as in vLLM, and not the same letters by others.

    Args:
      words: tokens of each.
      free: bits of the tokens that may come where ``inner`` does not say, int32 [W].
      inner: another constraint of the answer.
    """

    def __init__(
        self, words: Sequence[Sequence[int]], free: Int32[np.ndarray, " W"], inner: TokenConstraint | None = None
    ):
        self._words, self._free, self._inner = tuple(map(tuple, words)), free, inner
        self._tokens: list[int] = []

    @property
    def is_complete(self) -> bool:
        """Return whether nothing but an end token may follow."""
        return self._inner is not None and self._inner.is_complete

    def fill(self, words: Int32[np.ndarray, " W"]) -> None:
        """Set the bits of the tokens that may come next.

        Raises:
          GrammarError: none is left, since what else is asked of the answer leaves nothing but a bad word.
        """
        if self._inner is None:
            words[:] = self._free
        else:
            self._inner.fill(words)
        bits = words.view(np.uint32)
        for *before, last in self._words:
            if not before or self._tokens[-len(before) :] == before:
                bits[last // 32] &= ~np.uint32(1 << last % 32)
        if not bits.any():
            raise GrammarError("sampling.bad_words forbids every token that may come next; leave some of them out")

    def accept(self, token: int) -> None:
        """Take the token that came."""
        self._tokens.append(token)
        if self._inner is not None:
            self._inner.accept(token)

    def rollback(self, count: int) -> None:
        """Take back the last tokens."""
        if count:
            del self._tokens[-count:]
            if self._inner is not None:
                self._inner.rollback(count)

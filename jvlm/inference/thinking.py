"""A limit on the thinking of an answer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jvlm.inference.constrain import TokenConstraint, forced

OPENING, CLOSING = "<think>", "</think>"


class ThinkingBudget:
    """Ends the thinking of one answer after so many tokens, by the tokens of ``</think>``.

    Args:
      free: bits of the tokens that may come where nothing else is said, int32 [W].
      end_bits: of the tokens that end the answer; while it thinks they may not come.
      closing: tokens that end the thinking.
      budget: tokens of the thinking.
      inner: constraint of the answer, which sees the thinking too.
      opening: tokens that begin the thinking where they begin the answer; none if the prompt has begun it.
    """

    def __init__(
        self,
        free: np.ndarray,
        end_bits: np.ndarray,
        closing: Iterable[int],
        budget: int,
        inner: TokenConstraint | None = None,
        opening: Iterable[int] = (),
    ):
        self._free, self._end_bits, self._closing = free, end_bits, tuple(closing)
        self._budget, self._inner, self._opening = budget, inner, tuple(opening)
        self._tokens: list[int] = []
        self._closed_at: int | None = None

    @property
    def is_complete(self) -> bool:
        """Return whether nothing but an end token may follow."""
        return self._inner is not None and self._inner.is_complete

    @property
    def is_thinking(self) -> bool:
        """Return whether the thinking has begun and not ended."""
        begun = tuple(self._tokens[: len(self._opening)]) == self._opening
        return begun and self._closed_at is None

    def fill(self, words: np.ndarray) -> None:
        """Set the bits of the tokens that may come next, int32 [W]."""
        if self.is_thinking and len(self._tokens) - len(self._opening) >= self._budget:
            forced(words, self._closing[self._matched()])
        elif self.is_thinking:
            words[:] = self._free & ~self._end_bits
        elif self._inner is not None:
            self._inner.fill(words)
        else:
            words[:] = self._free | self._end_bits

    def accept(self, token: int) -> None:
        """Take the token that came."""
        thinking = self.is_thinking
        self._tokens.append(token)
        if self._inner is not None:
            self._inner.accept(token)
        if thinking and self._matched() == len(self._closing):
            self._closed_at = len(self._tokens)

    def rollback(self, count: int) -> None:
        """Take back the last tokens."""
        if not count:
            return
        del self._tokens[-count:]
        if self._inner is not None:
            self._inner.rollback(count)
        if self._closed_at is not None and len(self._tokens) < self._closed_at:
            self._closed_at = None

    def _matched(self) -> int:
        """Return how many tokens of the closing the last ones are."""
        for count in range(min(len(self._closing), len(self._tokens) - len(self._opening)), 0, -1):
            if tuple(self._tokens[-count:]) == self._closing[:count]:
                return count
        return 0

"""Drafts of the next tokens, from what followed the same tokens before."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

LENGTHS = (4, 3, 2)
LEAST_ACCEPTED = 0.3


class NGramDrafts:
    """Proposes what followed the last 4, 3 or 2 tokens where they stood last (prompt lookup decoding, Saxena 2023).

    It proposes nothing while fewer than `LEAST_ACCEPTED` of its recent proposals were right: each costs a token in the
    verifying step.

    Args:
      most: tokens of a proposal.
      window: proposed tokens that count as recent.
      pause: answer tokens for which it is silent after too few were right.
    """

    def __init__(self, most: int = 4, window: int = 32, pause: int = 64):
        self.most, self.pause = most, pause
        self.proposed = self.accepted = 0
        self._recent: deque[bool] = deque(maxlen=window)
        self._silent_until = 0
        self._seen = 0
        self._after: dict[tuple[int, ...], int] = {}  # the index after the last occurrence of some tokens

    def active(self, length: int) -> bool:
        """Return whether a sequence of so many tokens may be given a proposal."""
        return length >= self._silent_until

    def propose(self, tokens: Sequence[int], most: int | None = None) -> tuple[int, ...]:
        """Return up to ``most`` tokens that may follow; none if the last tokens stand nowhere before.

        Args:
          tokens: of the sequence; those of the last call, perhaps with more behind them.
        """
        self._index(tokens)
        most = self.most if most is None else min(most, self.most)
        if most < 1 or not self.active(len(tokens)):
            return ()
        for length in LENGTHS:
            start = self._after.get(tuple(tokens[-length:])) if len(tokens) > length else None
            if start is not None:
                return tuple(tokens[start : start + most])
        return ()

    def observe(self, length: int, proposed: int, accepted: int) -> None:
        """Count how many tokens of a proposal were right, in a sequence that now has ``length`` tokens."""
        self.proposed += proposed
        self.accepted += accepted
        self._recent.extend(i < accepted for i in range(proposed))
        if len(self._recent) == self._recent.maxlen and sum(self._recent) < LEAST_ACCEPTED * len(self._recent):
            self._silent_until = length + self.pause
            self._recent.clear()

    def _index(self, tokens: Sequence[int]) -> None:
        """Remember what stands before the last token: every group of tokens that another one follows."""
        for end in range(self._seen + 1, len(tokens)):
            for length in LENGTHS:
                if end >= length:
                    self._after[tuple(tokens[end - length : end])] = end
        self._seen = max(self._seen, len(tokens) - 1)

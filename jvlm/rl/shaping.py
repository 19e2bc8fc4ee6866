"""Terms that are added to rewards after the raw ones are stored: they shape how long answers are.

Pass rates, the pool of easy prompts and the choice of groups see raw rewards only.
"""

from __future__ import annotations

from collections.abc import Sequence

from jvlm.errors import UserError


def soft_overlong(length: int, longest: int, margin: int) -> float:
    """Return 0 up to ``margin`` tokens before ``longest``, falling to -1 there (DAPO, arXiv 2503.14476)."""
    if not 0 < margin <= longest:
        raise UserError(f"the margin of the length penalty, {margin}, must be from 1 to the longest answer, {longest}")
    return -min(max((length - (longest - margin)) / margin, 0.0), 1.0)


def repetition(token_ids: Sequence[int], n: int = 3, *, weight: float = 1.0) -> float:
    """Return minus ``weight`` times the share of n-grams of tokens that are there before (arXiv 2502.03373)."""
    grams = [tuple(token_ids[start : start + n]) for start in range(len(token_ids) - n + 1)]
    return -weight * (1 - len(set(grams)) / len(grams)) if grams else 0.0

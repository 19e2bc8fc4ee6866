"""``FILE#N``: a part of a file's examples, or several times as many as it has."""

from __future__ import annotations

import os
import re

import numpy as np
from jaxtyping import Int

from jvlm.errors import UserError

_COUNTED = re.compile(r"(?P<pattern>.+)#(?P<count>\d+)")


def split_count(pattern: str) -> tuple[str, int | None]:
    """Return the pattern and the number of ``PATTERN#N``; a file whose name is all of it has none.

    Raises:
      UserError: N is 0.
    """
    match = _COUNTED.fullmatch(pattern)
    if match is None or os.path.exists(pattern):
        return pattern, None
    count = int(match["count"])
    if not count:
        raise UserError(f"{pattern}: 0 examples; leave the file out, or give the number after # as 1 or more")
    return match["pattern"], count


def chosen(count: int, available: int) -> Int[np.ndarray, " n"]:
    """Return which of the available examples make up ``count``, ascending.

    Fewer are drawn without repetition, the same ones in every run; of more, every example is taken as often as it goes,
    and the rest is drawn.
    """
    whole, rest = divmod(count, available)
    drawn = np.random.default_rng((available, rest)).permutation(available)[:rest]
    return np.sort(np.concatenate([np.tile(np.arange(available), whole), drawn]))

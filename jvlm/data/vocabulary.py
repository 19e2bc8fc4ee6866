"""Token ids against the rows of the embedding table: JAX reads an id beyond the last row as the last row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int

from jvlm.errors import UserError

GROW = "jvlm.load(..., grow_embedding=True), adapt.grow_embedding in an experiment, or jvlm convert --grow_embedding"
_SHOWN = 5


def rows_needed(tokenizer: Any) -> int:
    """Return how many rows a table needs for all tokens, added ones included. Ids may have holes."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def check(tokenizer: Any, rows: int) -> None:
    """Check that every token has a row. A table with more rows than there are tokens is usual.

    Raises:
      UserError: naming the tokens, their ids and the number of rows.
    """
    outside = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if outside:
        listed = ", ".join(f"{token} ({i})" for i, token in outside[:_SHOWN])
        more = f" and {len(outside) - _SHOWN} more" if len(outside) > _SHOWN else ""
        raise UserError(
            f"the tokenizer{_of(tokenizer)} has {len(outside)} tokens without a row in the embedding table of {rows} "
            f"rows: {listed}{more}. Give the tokenizer that belongs to the weights, or let the table grow: {GROW}"
        )


def add_tokens(tokenizer: Any, tokens: Iterable[str]) -> None:
    """Add special tokens that the tokenizer lacks, behind its last id."""
    lacking = [token for token in tokens if token not in tokenizer.get_vocab()]
    if lacking:
        tokenizer.add_tokens(lacking, special_tokens=True)


def outside_problem(tokenizer: Any, ids: Int[np.ndarray, " S"], rows: int) -> str | None:
    """Return what is wrong with the ids of a prompt, if some have no row."""
    if not len(ids) or ids.max() < rows:
        return None
    first = int(ids[ids >= rows][0])
    return f"token {tokenizer.convert_ids_to_tokens(first)!r} has id {first}, and the embedding table {rows} rows"


def _of(tokenizer: Any) -> str:
    source = getattr(tokenizer, "name_or_path", "")
    return f" of {source}" if source else ""

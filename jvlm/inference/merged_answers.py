"""Whether a merged model answers as its base with the adapter does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jvlm.inference.generate import generate
from jvlm.models.layers import Precision
from jvlm.weights import hf, io


@dataclasses.dataclass(frozen=True)
class DifferentAnswer:
    """A conversation, by its number in the list, that two models answer differently."""

    number: int
    adapter: str
    merged: str


def different_answers(
    base: str | Path,
    adapter: str | Path,
    merged: str | Path,
    conversations: Sequence[Any],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    precision: Precision | None = None,
    sharding: hf.ShardingOf | None = None,
) -> list[DifferentAnswer]:
    """Return the conversations that the merged model answers differently, greedily; one model in memory at a time.

    In bfloat16 the two round differently, and an answer whose next words are nearly as likely as others may differ.

    Args:
      base, adapter: the folder of the base and the PEFT folder.
      merged: the folder that was made of them.
      conversations: as `generate` takes them.
    """
    given = {"precision": precision, "sharding": sharding}
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    first = generate(*io.load(base, adapter=adapter, **given), conversations, **settings)
    second = generate(*io.load(merged, **given), conversations, **settings)
    pairs = enumerate(zip(first, second, strict=True))
    return [DifferentAnswer(number, one, other) for number, (one, other) in pairs if one != other]

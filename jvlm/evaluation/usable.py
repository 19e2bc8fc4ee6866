"""Rows to evaluate on: those that cannot be asked are named before the training, or listed and left out after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jvlm.data.content import Conversation
from jvlm.data.errors import Rejected, RowError, grouped
from jvlm.data.processor import Processor
from jvlm.data.rows import parse_row
from jvlm.data.shards import RowSource
from jvlm.errors import UserError
from jvlm.evaluation.questions import questions_of

_PARSED = 5000  # rows of larger files are looked at in a sample of so many


def check(patterns: Sequence[str], processor: Processor, *, max_rows: int | None = None, seconds: float = 20.0) -> None:
    """Look at the rows as scoring will, pictures included: all of a small set, else those that the time allows.

    Raises:
      UserError: rows that cannot be asked, by reason, with the first places.
    """
    source = RowSource(patterns)
    count = min(len(source), max_rows or len(source))
    spread = np.unique(np.linspace(0, count - 1, min(count, _PARSED)).astype(int))
    order = [int(i) for i in np.random.default_rng(0).permutation(spread)]
    began, looked, rejected, block = time.perf_counter(), 0, [], 32
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(order), block):
            part = order[start : start + block]
            found = pool.map(lambda i: _rejected(lambda: encode(source[i], processor)), part)
            rejected += [row for row in found if row is not None]
            looked += len(part)
            if time.perf_counter() - began > seconds:
                break
    if rejected:
        rejected.sort(key=lambda row: (row.file, row.row))
        raise UserError(
            f"evaluation.data: {len(rejected)} of {looked} rows looked at cannot be asked:\n{grouped(rejected)}\n"
            "Mend or remove them; nothing was trained yet"
        )


def encode(element: tuple, processor: Processor) -> Conversation:
    """A checked row whose pictures are there and which has something to ask. Raises RowError."""
    conversation = parsed(element)
    processor.encode(conversation)
    if not questions_of(conversation):
        raise RowError(conversation.origin, "messages", "no assistant turn to ask for", "Add one, or remove the row")
    return conversation


def parsed(element: tuple) -> Conversation:
    """A checked row of a `RowSource`. Raises RowError."""
    origin, row = element
    if isinstance(row, RowError):
        raise row
    return parse_row(row, origin)


def _rejected(work: Callable[[], object]) -> Rejected | None:
    try:
        work()
    except RowError as error:
        return Rejected.of(error, "bad")
    return None


def rows_of(
    patterns: Sequence[str],
    read: Callable[[tuple], Conversation] = parsed,
    *,
    max_rows: int | None = None,
    rejected: list[Rejected],
) -> Iterator[Conversation]:
    """The rows that can be read, one at a time; the others are appended to ``rejected``."""
    source = RowSource(patterns)
    for index in range(min(len(source), max_rows or len(source))):
        try:
            yield read(source[index])
        except RowError as error:
            rejected.append(Rejected.of(error, "bad"))


def all_rows_of(patterns: Sequence[str]) -> Iterator[Conversation]:
    """Every row, one at a time. Raises the RowError of one that cannot be read."""
    source = RowSource(patterns)
    return (parsed(source[index]) for index in range(len(source)))

"""Columns of the data that jvlm does not know: carried along, counted, and listed once each."""

from __future__ import annotations

from collections import Counter

from jvlm.data.content import Conversation, Document
from jvlm.data.examples import hint, unknown_columns


class UnknownColumns:
    """Counts the unknown columns of the examples that it is shown."""

    def __init__(self):
        self.counts: Counter[str] = Counter()

    def add(self, example: Conversation | Document) -> None:
        """Count the columns of one example."""
        self.counts.update(unknown_columns(example.extra))

    def lines(self) -> list[str]:
        """One line for each column, the most frequent first; empty if every column is known."""
        return [
            f"column {name!r} is not used, in {count} example{'s' if count > 1 else ''}" + _meant(name)
            for name, count in self.counts.most_common()
        ]


def _meant(name: str) -> str:
    near = hint(name)
    return f". Is it meant to be {near!r}?" if near else ""

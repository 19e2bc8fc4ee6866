"""What the engine is to run next.

Plans are executed in the order in which `Scheduler.next` gives them. The device finishes one before it begins the next,
so a plan may use pages, features and slots as the one before leaves them, although nobody has read its results yet.

Axes: R rows, T tokens, W pages of a table row, K drafted tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

# In place of an input token: the last one that the device drew for the slot, which the host has not read.
ON_DEVICE = -1


class Row(NamedTuple):
    """A sequence in a plan.

    Attributes:
      sequence: the scheduler's number of the sequence; never used again.
      request_id: of its request.
      index: which of the request's ``n`` answers.
      slot, generation: where it decodes. The generation changes whenever a slot is given anew, so that a late token
        cannot reach another sequence.
      draw: answer tokens before the first one that this row draws: with the request's seed it decides the draw.
    """

    sequence: int
    request_id: str
    index: int
    slot: int
    generation: int
    draw: int


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image or video to encode.

    Attributes:
      request_id: of a request that holds it.
      number: which of the request's media, from 0.
      key: content hash, under which the features are kept.
      feature_slots: slot in the feature pool of each of its vision tokens, int32.
      patches: number of its patches.
    """

    request_id: str
    number: int
    key: bytes
    feature_slots: np.ndarray
    patches: int


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a prompt (of prompt and answer, for a sequence that was preempted).

    Attributes:
      row: the sequence whose pages are written.
      start: index of the first token in the sequence: the length of what is in its pages already; whole pages.
      tokens: int32 [T].
      positions: rotary positions, int32 [T, 3]; taken from those of the whole sequence.
      feature_index: slot in the feature pool that feeds each token, int32 [T]; -1 for text.
      table: pages of the sequence, int32 [W], padded with 0.
      samples: sequences that draw a token from the last token's scores: none but for the last chunk, all of the
        request's answers for that of a prompt.
      cached: tokens of the sequence that were found in the cache when it was admitted.
    """

    row: Row
    start: int
    tokens: np.ndarray
    positions: np.ndarray
    feature_index: np.ndarray
    table: np.ndarray
    samples: tuple[Row, ...]
    cached: int

    @property
    def stop(self) -> int:
        """Return the index after the last token."""
        return self.start + len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Encode:
    """Run the vision tower over pictures, and write their features into the pool."""

    pictures: tuple[Picture, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Return the sequences that draw a token: none."""
        return ()


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Run chunks of several sequences."""

    chunks: tuple[Chunk, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Return the sequences that draw a token."""
        return tuple(row for chunk in self.chunks for row in chunk.samples)


@dataclasses.dataclass(frozen=True)
class Decode:
    """Run the last token of each sequence, and then the tokens that are drawn; or the last and the drafted ones.

    Attributes:
      rows: the sequences.
      slots: of each, int32 [R].
      draws: answer tokens before the first one that is drawn, int32 [R].
      steps: how many tokens to draw, one after the other, int32 [R]; 1 if any token of the plan is drafted.
      tokens: input tokens, int32 [R, 1 + K]: the last one, or `ON_DEVICE`; then the drafted ones.
      drafted: how many drafted tokens each row has, int32 [R]; the others are 0 and do not count.
      starts: index in the sequence of the first input token, int32 [R].
      positions: rotary position of the first input token, on all axes, int32 [R]; the next ones follow by 1.
      tables: pages, int32 [R, W], padded with 0.
      copies: (from, to) pages to copy before, all at once: a page may be read by one and written by another.
    """

    rows: tuple[Row, ...]
    slots: np.ndarray
    draws: np.ndarray
    steps: np.ndarray
    tokens: np.ndarray
    drafted: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    tables: np.ndarray
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def length(self) -> int:
        """Return how many times the model runs."""
        return int(self.steps.max())


Plan = Encode | Prefill | Decode


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a row.

    Attributes:
      tokens: those drawn, as many as were planned unless one ends the sequence; with accepted drafts more than one. All
        count, also one that ends the sequence.
      ended: nothing more is wanted of the sequence.
    """

    tokens: tuple[int, ...]
    ended: bool = False


Results = Mapping[int, Result]

"""Batches of planned sequences, whose images are decoded once the batch is there to write them into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jvlm.data.errors import ExampleError, Rejected
from jvlm.data.packing import Example
from jvlm.data.position import Progress
from jvlm.data.unread_patches import UnreadImage
from jvlm.data.workers import Result
from jvlm.models.packed_batch import PackedBatch

Write = Callable[[Example, np.ndarray], None]


class Begun(NamedTuple):
    """A batch in the making, what was rejected before it, and the progress once it is given out."""

    batch: DecodingBatch
    rejected: list[Rejected]
    progress: Progress


class DecodingBatch:
    """A batch whose images are being decoded. Several may be, so that nobody waits for the last image of one of them.

    Args:
      assemble: `jvlm.data.packing.assemble` with sequences and what writes patches.
      patches: begins to write the patches of an image.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[Example]],
        assemble: Callable[[Sequence[Sequence[Example]], Write], PackedBatch],
        patches: Callable[[UnreadImage, np.ndarray], Result],
    ):
        self._sequences, self._assemble, self._patches = sequences, assemble, patches
        self._begun: list[tuple[Example, Result]] = []
        self._arrays: dict[int, np.ndarray] = {}
        try:
            self._batch = assemble(sequences, self._write)
        except BaseException:
            self.drop()
            raise

    def _write(self, example: Example, out: np.ndarray) -> None:
        self._arrays[id(example)] = out
        if isinstance(example.patches, np.ndarray):
            out[:] = example.patches
            return
        for piece, first in example.patches.pieces_from():
            if isinstance(piece, np.ndarray):
                out[first : first + len(piece)] = piece
            else:
                target = out[first : first + piece.stop - piece.start]
                self._begun.append((example, self._patches(piece, target)))

    def finish(self) -> tuple[PackedBatch, list[list[Example]], list[tuple[Example, ExampleError]]]:
        """Return the batch, its sequences, and the examples that are not in it, since an image cannot be decoded."""
        failed: dict[int, tuple[Example, ExampleError]] = {}
        try:
            for example, result in self._begun:
                try:
                    result.result()
                except ExampleError as error:
                    failed.setdefault(id(example), (example, error))
        except BaseException:
            self.drop()
            raise
        if not failed:
            return self._batch, [list(sequence) for sequence in self._sequences], []
        kept = [
            [
                dataclasses.replace(one, patches=self._arrays[id(one)]) if one.num_patches else one
                for one in sequence
                if id(one) not in failed
            ]
            for sequence in self._sequences
        ]
        return self._assemble(kept, _copied), kept, list(failed.values())

    def drop(self) -> None:
        """End: nothing is written to the batch any more, whose memory others may use."""
        running = [result for _, result in self._begun if not result.cancel()]
        for result in running:
            result.wait()


def _copied(example: Example, out: np.ndarray) -> None:
    out[:] = example.patches


def rejected(failed: Sequence[tuple[Example, ExampleError]]) -> list[Rejected]:
    """Return examples that could not be decoded; a later part of a document as "part", since others are used."""
    return [Rejected.of(error, "bad" if example.records else "part") for example, error in failed]

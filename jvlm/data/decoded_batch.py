"""A batch of planned sequences with the pixels of its images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jvlm.data.errors import ExampleError, Rejected
from jvlm.data.packing import Example
from jvlm.data.unread_patches import UnreadImage
from jvlm.data.workers import Result
from jvlm.models.packed_batch import PackedBatch

Write = Callable[[Example, np.ndarray], None]


def decoded_batch(
    sequences: Sequence[Sequence[Example]],
    assemble: Callable[[Sequence[Sequence[Example]], Write], PackedBatch],
    patches: Callable[[UnreadImage, np.ndarray], Result],
) -> tuple[PackedBatch, list[list[Example]], list[tuple[Example, ExampleError]]]:
    """Return a batch, its sequences, and the examples that are not in it, since an image of theirs cannot be decoded.

    Args:
      assemble: `jvlm.data.packing.assemble` with sequences and what writes patches.
      patches: begins to write the patches of an image.
    """
    begun: list[tuple[Example, Result]] = []
    arrays: dict[int, np.ndarray] = {}

    def write(example: Example, out: np.ndarray) -> None:
        arrays[id(example)] = out
        if isinstance(example.patches, np.ndarray):
            out[:] = example.patches
            return
        for piece, first in example.patches.pieces_from():
            if isinstance(piece, np.ndarray):
                out[first : first + len(piece)] = piece
            else:
                target = out[first : first + piece.stop - piece.start]
                begun.append((example, patches(piece, target)))

    batch = assemble(sequences, write)
    failed: dict[int, tuple[Example, ExampleError]] = {}
    for example, result in begun:
        try:
            result.result()
        except ExampleError as error:
            failed.setdefault(id(example), (example, error))
    if not failed:
        return batch, [list(sequence) for sequence in sequences], []
    kept = [
        [
            dataclasses.replace(one, patches=arrays[id(one)]) if one.num_patches else one
            for one in sequence
            if id(one) not in failed
        ]
        for sequence in sequences
    ]
    return assemble(kept, _copied), kept, list(failed.values())


def _copied(example: Example, out: np.ndarray) -> None:
    out[:] = example.patches


def rejected(failed: Sequence[tuple[Example, ExampleError]]) -> list[Rejected]:
    """Return examples that could not be decoded; a later part of a document as "part", since others are used."""
    return [Rejected.of(error, "bad" if example.records else "part") for example, error in failed]

"""The order of a source's examples: a permutation for each pass, as a function of the number of the draw alone.

Grain's window shuffle is not used: where the examples are no multiple of a window it loses some and repeats others.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from jvlm.data.choices import Order

BLOCKS_PER_WINDOW = 16  # blocks whose examples are mixed with one another


def source_seed(seed: int, name: str) -> int:
    """Return the seed of a source: other sources of the run, even of the same length, have other orders."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little")


class BlockOrder:
    """Examples in blocks that are read together: blocks in a new order each pass, mixed within windows of several.

    The last window is shorter where blocks do not fill it.

    Args:
      starts: first example of each block, ascending from 0, and the number of examples at the end.
      seed: of the source.
      blocks: of a window.
      files: first example of each file, and the number of examples: where blocks are parts of files that are copied as
        they are read, the files come in a new order, and the blocks of so many files are mixed at a time.
    """

    def __init__(
        self,
        starts: Int[np.ndarray, " B"],
        seed: int,
        blocks: int = BLOCKS_PER_WINDOW,
        files: Int[np.ndarray, " F"] | None = None,
    ):
        self.starts, self.seed, self.blocks = np.asarray(starts, np.int64), seed, blocks
        self.files = None if files is None else np.asarray(files, np.int64)
        self._blocks_of = functools.lru_cache(maxsize=2)(self._shuffled_blocks)
        self._inside = functools.lru_cache(maxsize=4)(self._shuffled_window)

    def __getstate__(self) -> dict[str, Any]:
        return {"starts": self.starts, "seed": self.seed, "blocks": self.blocks, "files": self.files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __getitem__(self, draw: int) -> int:
        """Return the example of the draw-th draw."""
        epoch, within = divmod(draw, int(self.starts[-1]))
        _, ends = self._blocks_of(epoch)
        window = int(np.searchsorted(ends, within, "right")) // self.blocks
        examples = self._inside(epoch, window)
        first = int(ends[window * self.blocks - 1]) if window else 0
        return int(examples[within - first])

    def _shuffled_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(blocks in their order, examples up to the end of each)."""
        if self.files is None:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.starts) - 1)
        else:
            first = np.searchsorted(self.starts, self.files)  # block of each file
            by_file = BlockOrder(first, self.seed, self.blocks)
            order = np.asarray([by_file[epoch * int(first[-1]) + i] for i in range(int(first[-1]))])
        return order, np.cumsum(np.diff(self.starts)[order])

    def _shuffled_window(self, epoch: int, window: int) -> np.ndarray:
        order, _ = self._blocks_of(epoch)
        mine = order[window * self.blocks : (window + 1) * self.blocks]
        examples = np.concatenate([np.arange(self.starts[b], self.starts[b + 1]) for b in mine])
        return np.random.default_rng((self.seed, epoch, window)).permutation(examples)


class FileOrder:
    """Examples as the files have them, pass after pass."""

    def __init__(self, examples: int):
        self.examples = examples

    def __getitem__(self, draw: int) -> int:
        return draw % self.examples


class GlobalOrder:
    """All examples in a new order each pass (Grain's format-preserving permutation)."""

    def __init__(self, examples: int, seed: int):
        self._indices = grain.MapDataset.range(examples).shuffle(seed=seed).repeat()

    def __getitem__(self, draw: int) -> int:
        return int(self._indices[draw])


def order_of(source: Any, order: Order, seed: int) -> BlockOrder | FileOrder | GlobalOrder:
    """Return the order of a source's examples.

    Args:
      source: has a length; ``block_starts`` where its examples are read in blocks, as row groups or archives are;
        ``file_starts`` where its files are copied as they are read.
      order: "auto" is by blocks where the source has some, else over all examples.
      seed: of the source.
    """
    if order == "none":
        return FileOrder(len(source))
    starts, files = source.block_starts(), source.file_starts()
    if order == "blocks" or (order == "auto" and starts is not None):
        if starts is None:
            starts = np.append(np.arange(0, len(source), _BLOCK), len(source))
        return BlockOrder(starts, seed, files=files)
    return GlobalOrder(len(source), seed)


def spread_over(source: Any, count: int) -> Int[np.ndarray, " N"]:
    """Return the indices of up to so many examples of a source, ascending, spread evenly over all of it.

    Where files are copied as they are read, they are spread over a few of the files.

    Args:
      source: see `order_of`.
    """
    count, starts = min(count, len(source)), source.file_starts()
    if starts is None or len(starts) - 1 <= _FILES:
        return np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64))
    chosen = np.linspace(0, len(starts) - 2, _FILES).astype(int)
    inside = np.concatenate([np.arange(starts[file], starts[file + 1]) for file in chosen])
    return inside[np.unique(np.linspace(0, len(inside) - 1, min(count, len(inside))).astype(int))]


_FILES = 8  # of which a sample is taken, where each is copied first
_BLOCK = 1024  # examples read together of files that have no blocks of their own

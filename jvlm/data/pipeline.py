"""Grain pipeline: rows -> shuffled -> encoded -> packed over tokens and patches -> prefetched batches.

The iterator's state is a small JSON value; restoring it costs one packing window, whatever the size of the data.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from jvlm.data import packing
from jvlm.data.errors import Origin, Rejected, RowError
from jvlm.data.packing import Example, PackedRows
from jvlm.data.processor import Processor
from jvlm.data.rows import Conversation, parse_row
from jvlm.data.shards import RowSource
from jvlm.data.turns import turns_alone
from jvlm.data.vision import MediaConfig, Vision


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it is packed.

    Attributes:
      train: files or globs of JSONL and ArrayRecord rows.
      media_root: folder for relative media paths, after the data file's own.
      rows: rows of a batch (of one accumulation step).
      row_tokens, row_patches: places of a row; row_patches 0 is a text-only run.
      max_length: longest conversation in tokens; None allows a whole row. A small value makes attention cheaper.
      max_frame_patches: most patches an image or frame may have; None reads it off the media configuration.
      on_too_long: stop, leave the conversation out, or drop whole turns from its end.
      on_bad_row: stop, or leave the row out; either way rows left out are counted and listed.
      max_bad_fraction: with "skip", stop when more than this share of the rows read was bad.
      shuffle: new order each epoch, from the seed.
      alone: share of the conversations, drawn anew each epoch, of which a single turn is learnt, without its history
        (jvlm.data.turns). Where answers give one another away, this is what teaches a model to look. The turn is
        drawn in proportion to its loss weight.
      pack_window: conversations considered together for packing.
      read_threads: threads that decode and encode.
      worker_processes: processes instead of threads; 0 is none. For data too heavy for one process.
      prefetch: batches prepared ahead.
    """

    train: tuple[str, ...] = ()
    media_root: str | None = None
    rows: int = 1
    row_tokens: int = 4096
    row_patches: int = 8192
    max_length: int | None = None
    max_frame_patches: int | None = None
    on_too_long: Literal["error", "drop", "truncate"] = "drop"
    on_bad_row: Literal["error", "skip"] = "error"
    max_bad_fraction: float = 0.001
    shuffle: bool = True
    alone: float = 0.0
    pack_window: int = 128
    read_threads: int = 4
    worker_processes: int = 0
    prefetch: int = 4

    def __post_init__(self):
        for name in ("rows", "row_tokens", "pack_window", "read_threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.alone <= 1:
            raise ValueError(f"data.alone is a share, got {self.alone}")


class Encode(grain.transforms.RandomMap):
    """(origin, row) to an `Example`, or to a `Rejected` where the config allows leaving rows out."""

    def __init__(self, processor: Processor, config: DataConfig):
        self.processor, self.config = processor, config

    def random_map(self, element: tuple[Origin, Any], rng: np.random.Generator) -> Example | Rejected:
        origin, row = element
        try:
            if isinstance(row, RowError):
                raise row
            conversation = parse_row(row, origin)
            if rng.random() < self.config.alone:
                conversation = _one_turn(conversation, rng)
            example = self.processor.encode(conversation)
            _check_learnable(example)
        except RowError as error:
            if self.config.on_bad_row == "error":
                raise
            return Rejected(origin.file, origin.row, error.field, f"{error.problem}")
        return self._fit(example)

    def _fit(self, example: Example) -> Example | Rejected:
        config, origin = self.config, example.origin
        limit = min(config.row_tokens, config.max_length or config.row_tokens)
        if example.length > limit and config.on_too_long == "truncate":
            shorter = packing.truncate(example, limit)
            if shorter is None:
                return Rejected(origin.file, origin.row, "messages", f"no assistant turn ends within {limit} tokens")
            example = shorter
        try:
            packing.check_fits(example, config.row_tokens, config.row_patches, config.max_length)
        except RowError as error:
            if config.on_too_long == "error":
                raise
            return Rejected(origin.file, origin.row, error.field, error.problem)
        return example


def _one_turn(conversation: Conversation, rng: np.random.Generator) -> Conversation:
    """A turn drawn in proportion to its loss weight; the conversation as it is if none has any."""
    turns = [turn for turn in turns_alone(conversation) if turn.messages[-1].loss_weight > 0]
    if not turns:
        return conversation
    weights = np.asarray([turn.messages[-1].loss_weight for turn in turns])
    return turns[rng.choice(len(turns), p=weights / weights.sum())]


def _check_learnable(example: Example) -> None:
    if not (example.loss_weights > 0).any():
        raise RowError(example.origin, "messages", "no assistant turn to learn from", "Add one, or set its loss true")


class PackDataset(grain.IterDataset):
    """Packs a stream of examples into batches of ``rows`` rows."""

    def __init__(self, parent: grain.IterDataset, config: DataConfig, patch_values: int, max_frame_patches: int | None):
        super().__init__(parent)
        self.config, self.patch_values, self.max_frame_patches = config, patch_values, max_frame_patches

    def __iter__(self) -> PackIterator:
        return PackIterator(self._parent.__iter__(), self)


class PackIterator(grain.DatasetIterator):
    """Takes ``pack_window`` examples at a time and packs them best-fit; the last batch is filled with empty rows.

    State: the parent's state before the current window, and how many of the window's rows have been given out.
    """

    def __init__(self, parent: grain.DatasetIterator, dataset: PackDataset):
        super().__init__(parent)
        self.dataset = dataset
        self._window_state = parent.get_state()
        self._queue: deque[list[Example]] = deque()
        self._rejected: list[Rejected] = []
        self._given = 0

    def __next__(self) -> PackedRows:
        config = self.dataset.config
        rows: list[list[Example]] = []
        rejected: list[Rejected] = []
        while len(rows) < config.rows:
            if not self._queue and not self._next_window():
                break
            rejected += self._rejected
            self._rejected = []
            while self._queue and len(rows) < config.rows:
                rows.append(self._queue.popleft())
                self._given += 1
        if not rows and not rejected:
            raise StopIteration
        count = sum(map(len, rows))
        rows += [[]] * (config.rows - len(rows))
        batch = packing.assemble(
            rows,
            config.row_tokens,
            config.row_patches,
            patch_values=self.dataset.patch_values,
            max_segment_length=config.max_length,
            max_frame_patches=self.dataset.max_frame_patches,
        )
        return PackedRows(batch, count, tuple(rejected), tuple(tuple(e.origin for e in row) for row in rows))

    def _next_window(self) -> bool:
        """Fill the queue from the next window; False at the end of the data."""
        config = self.dataset.config
        self._window_state = self._parent.get_state()
        self._given = 0
        examples: list[Example] = []
        read = 0
        while len(examples) < config.pack_window:
            try:
                element = next(self._parent)
            except StopIteration:
                break
            read += 1
            if isinstance(element, Rejected):
                self._rejected.append(element)
            else:
                examples.append(element)
        packed = packing.best_fit_decreasing(examples, config.row_tokens, config.row_patches)
        self._queue.extend([examples[i] for i in row] for row in packed)
        return read > 0

    def get_state(self) -> dict[str, Any]:
        return {"window": self._window_state, "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["window"])
        self._queue.clear()
        self._rejected = []
        self._window_state, given = state["window"], state["given"]
        if given:
            self._next_window()
            # what a window rejects is reported with its first row, which has been given out
            self._rejected = []
            for _ in range(given):
                self._queue.popleft()
            self._given = given


def training_data(
    processor: Processor, config: DataConfig, *, seed: int, epochs: int | None = None
) -> tuple[grain.IterDataset, RowSource]:
    """The batches of a run (endless unless ``epochs`` is given), and the rows they come from."""
    source = RowSource(config.train)
    dataset = grain.MapDataset.source(source).seed(seed)
    if config.shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(epochs).random_map(Encode(processor, config))
    stream = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=4 * config.read_threads)
    )
    if config.worker_processes:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's processes read absl flags, which only absl programs parse
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.worker_processes))
    most = frame_patches(processor.vision, processor.media, config)
    packed = PackDataset(stream, config, processor.vision.patch_values, most)
    return grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=config.prefetch), source


def frame_patches(vision: Vision, media: MediaConfig, config: DataConfig) -> int | None:
    """Most patches of one image or frame: what the media configuration allows, if that is less than a row."""
    if config.max_frame_patches is not None:
        return config.max_frame_patches
    most = vision.max_frame_patches(media)
    return most if most is not None and most < config.row_patches else None

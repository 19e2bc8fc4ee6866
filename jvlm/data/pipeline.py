"""Grain pipeline: rows -> shuffled -> encoded -> packed over tokens and patches -> prefetched batches.

The iterator's state is a small JSON value (jvlm.data.position), good for any number of processes; restoring it costs
one packing window, whatever the size of the data.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from jvlm.data import packing
from jvlm.data.errors import Origin, Rejected, RowError
from jvlm.data.packing import Example, PackedRows
from jvlm.data.position import Progress, Share, go_on
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
      rows: rows of a batch (of one accumulation step), all processes together.
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


class _Windows(grain.MapDataset):
    """The rows of a process's windows, from its present one on. Places after the end of the data are None."""

    def __init__(self, parent: grain.MapDataset, window: int, progress: Progress):
        super().__init__(parent)
        self.window, self.progress = window, progress

    def __len__(self) -> int:
        places = len(self._parent)
        if places >= sys.maxsize // 2:
            return sys.maxsize
        position, share = self.progress.position, self.progress.share
        items = len(position.open) + max(-(-places // self.window) - position.next, 0)
        mine = -(-(items - share.index) // share.count) - self.progress.done
        return max(mine, 0) * self.window

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        item, within = divmod(index, self.window)
        window, _ = dataclasses.replace(self.progress, done=self.progress.done + item).item
        place = window * self.window + within
        return self._parent[place] if place < len(self._parent) else None


class PackDataset(grain.IterDataset):
    """Packs a process's share of the encoded rows into batches of ``rows`` rows."""

    def __init__(
        self,
        parent: grain.MapDataset,
        config: DataConfig,
        rows: int,
        share: Share,
        patch_values: int,
        max_frame_patches: int | None,
    ):
        super().__init__(parent)
        self.config, self.rows, self.share = config, rows, share
        self.patch_values, self.max_frame_patches = patch_values, max_frame_patches

    def __iter__(self) -> PackIterator:
        return PackIterator(self)

    def stream(self, progress: Progress) -> grain.DatasetIterator:
        """Examples and rejected rows from the present window on."""
        config = self.config
        stream = _Windows(self._parent, config.pack_window, progress).to_iter_dataset(
            grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=4 * config.read_threads)
        )
        if config.worker_processes:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's processes read absl flags, which only absl programs parse
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.worker_processes))
        return iter(stream)

    def window_size(self, window: int) -> int:
        """Rows of a window; fewer, or none, at the end of the data."""
        return max(0, min(self.config.pack_window, len(self._parent) - window * self.config.pack_window))


class PackIterator(grain.DatasetIterator):
    """Packs a window at a time, best fit; the last batch is filled with empty rows.

    State: see `jvlm.data.position`; restored from those of all processes.
    """

    def __init__(self, dataset: PackDataset):
        super().__init__()
        self.dataset = dataset
        self._stream: grain.DatasetIterator | None = None
        self._begin(Progress(share=dataset.share))

    def _begin(self, progress: Progress) -> None:
        if self._stream is not None:
            self._stream.close()
        self._progress = progress
        self._stream = self.dataset.stream(progress)
        self._queue: deque[list[Example]] = deque()
        self._rejected: list[Rejected] = []

    def __next__(self) -> PackedRows:
        config, count = self.dataset.config, self.dataset.rows
        rows: list[list[Example]] = []
        rejected: list[Rejected] = []
        while len(rows) < count:
            if not self._queue and not self._next_window():
                break
            rejected += self._rejected
            self._rejected = []
            while self._queue and len(rows) < count:
                rows.append(self._queue.popleft())
                self._progress = dataclasses.replace(self._progress, given=self._progress.given + 1)
            if not self._queue:
                self._progress = dataclasses.replace(self._progress, done=self._progress.done + 1, given=0)
        if not rows and not rejected:
            raise StopIteration
        batch = packing.assemble(
            rows + [[]] * (count - len(rows)),
            config.row_tokens,
            config.row_patches,
            patch_values=self.dataset.patch_values,
            max_segment_length=config.max_length,
            max_frame_patches=self.dataset.max_frame_patches,
        )
        origins = tuple(tuple(e.origin for e in row) for row in rows)
        return PackedRows(batch, sum(map(len, rows)), tuple(rejected), origins)

    def _next_window(self) -> bool:
        """Fill the queue from the present window; False at the end of the data."""
        config = self.dataset.config
        window, before = self._progress.item
        elements = [next(self._stream) for _ in range(self.dataset.window_size(window))]
        examples = [e for e in elements if not isinstance(e, Rejected)]
        given = max(before, self._progress.given)
        if not given:  # what a window rejects is reported with its first row
            self._rejected = [e for e in elements if isinstance(e, Rejected)]
        packed = packing.best_fit_decreasing(examples, config.row_tokens, config.row_patches)
        self._queue.extend([examples[i] for i in row] for row in packed[given:])
        self._progress = dataclasses.replace(self._progress, given=given)
        return bool(elements)

    def get_state(self) -> list[dict[str, Any]]:
        """Of this process. A checkpoint gathers those of all, in any order."""
        return [self._progress.state()]

    def set_state(self, state: Sequence[dict[str, Any]]) -> None:
        self._begin(go_on(state, self.dataset.share))

    def close(self) -> None:
        super().close()
        self._stream.close()


def training_data(
    processor: Processor, config: DataConfig, *, seed: int, epochs: int | None = None, share: Share = Share()
) -> tuple[grain.IterDataset, RowSource]:
    """A process's share of the batches of a run (endless unless ``epochs`` is given), and the rows they come from.

    Raises:
      ValueError: the rows of a batch cannot be shared evenly by so many processes.
    """
    source = RowSource(config.train)
    dataset = grain.MapDataset.source(source).seed(seed)
    if config.shuffle:
        dataset = dataset.shuffle()
    encoded = dataset.repeat(epochs).random_map(Encode(processor, config))
    values, most = processor.vision.patch_values, frame_patches(processor.vision, processor.media, config)
    packed = PackDataset(encoded, config, share.of(config.rows), share, values, most)
    return grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=config.prefetch), source


def frame_patches(vision: Vision, media: MediaConfig, config: DataConfig) -> int | None:
    """Most patches of one image or frame: what the media configuration allows, if that is less than a row."""
    if config.max_frame_patches is not None:
        return config.max_frame_patches
    most = vision.max_frame_patches(media)
    return most if most is not None and most < config.row_patches else None

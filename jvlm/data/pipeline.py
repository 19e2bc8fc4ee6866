"""Grain pipeline: examples -> shuffled -> encoded -> packed over tokens and patches -> decoded -> prefetched batches.

Examples are encoded from the headers of their images, and a window of them is packed; images are decoded when their
sequence is given out. So a window may be long, which fills sequences, and takes little memory.

The iterator's state is a small JSON value (jvlm.data.position), good for any number of processes; restoring it costs
one packing window, whatever the size of the data.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from jvlm.data import decoded_batch, packing, preferences
from jvlm.data.config import DataConfig
from jvlm.data.cutting import Limits
from jvlm.data.decoded_batch import Begun, Write
from jvlm.data.encode import Encode, EncodeDrawn, Known, image_patch_limit
from jvlm.data.errors import Rejected, grouped
from jvlm.data.joining import joined
from jvlm.data.mixture.examples import Draws, Examples, mixture_of
from jvlm.data.packing import Example, PackedSequences
from jvlm.data.position import Progress, Share, go_on
from jvlm.data.prefetch import PrefetchedBatches
from jvlm.data.processor import Processor
from jvlm.data.waiting import Waiting
from jvlm.data.workers import Result, Workers, workers_of
from jvlm.errors import UserError
from jvlm.models.packed_batch import PackedBatch


def complete_window(results: Sequence[Sequence[Example | Rejected]], config: DataConfig) -> Sequence[Sequence]:
    """Return what the examples of a packing window gave, with what depends on their neighbours."""
    if config.preference != "labels":
        return results
    return preferences.with_other_answers(results, config.seq_len, config.longest)


class PackDataset(grain.IterDataset):
    """Packs a process's share of the encoded examples into batches.

    Args:
      draws: what the elements are encoded from.
      sequences: packed sequences of a batch.

    Iterating raises UserError where none of the examples gives anything to learn from.
    """

    def __init__(
        self,
        parent: grain.MapDataset,
        draws: Draws,
        processor: Processor,
        config: DataConfig,
        sequences: int,
        share: Share,
    ):
        super().__init__(parent)
        self.processor, self.config, self.sequences, self.share = processor, config, sequences, share
        self.draws, self.epoch = draws, len(draws.examples)  # examples of the data
        self.window_size = config.window(self.epoch)
        images = processor.image_processor
        self.max_image_patches = image_patch_limit(images, processor.image_config, config)
        self.by_source = mixture_of(config).unit == "sequences"

    def __iter__(self) -> PackIterator:
        return PackIterator(self)

    def workers(self) -> Workers:
        """Start what reads examples and decodes images."""
        config = self.config
        return workers_of(self._parent, self.processor, config.read_threads, config.worker_processes)

    def described(self, draw: int) -> str:
        """Return which example a draw is."""
        return str(self.draws[draw].origin)

    def window(self, number: int) -> range:
        """Draws of a window; fewer, or none, at the end of the data."""
        start, size = number * self.window_size, self.window_size
        return range(start, max(start, min(start + size, len(self._parent))))


class PackIterator(grain.DatasetIterator):
    """Packs a window at a time, best fit; the last batch is filled with empty sequences.

    State: see `jvlm.data.position`; restored from those of all processes.
    """

    def __init__(self, dataset: PackDataset):
        super().__init__()
        self.dataset = dataset
        self._workers: Workers | None = None
        self._asked: deque[Result] = deque()
        self._begun: deque[Begun] = deque()
        self._begin(Progress(share=dataset.share))

    def _begin(self, progress: Progress) -> None:
        self._progress = self._given = progress  # of the batches that are begun, and of those that were given out
        self._drop()
        self._draws = self._draws_from(progress)
        self._queue: deque[tuple[list[Example], list[Rejected]]] = deque()  # sequences, with what is reported with each
        self._ahead = 0  # examples of the next window to ask for with each sequence
        self._rejected: list[Rejected] = []
        # examples left out since the last that could be encoded, and since the last that could be decoded
        self._unusable: list[Rejected] = []
        self._undecoded: list[Rejected] = []

    def _drop(self) -> None:
        for result in self._asked:
            result.cancel()
        self._asked.clear()
        for begun in self._begun:
            begun.batch.drop()
        self._begun.clear()

    def _draws_from(self, progress: Progress) -> Iterator[int]:
        """Draws of the present window and of all that follow."""
        for done in itertools.count(progress.done):
            draws = self.dataset.window(dataclasses.replace(progress, done=done).item[0])
            if not draws:
                return
            yield from draws

    def _ask(self, count: int) -> None:
        """Let so many more examples be read."""
        if self._workers is None:
            self._workers = self.dataset.workers()
        for draw in itertools.islice(self._draws, max(count, 0)):
            self._asked.append(self._workers.example(draw))

    def __next__(self) -> PackedSequences:
        config, count = self.dataset.config, self.dataset.sequences
        if not self._begun:
            self._begin_batch()
        # of the same window: the next one may take long to read
        while len(self._begun) <= config.decoded_ahead and len(self._queue) >= count:
            self._begin_batch()
        begun = self._begun.popleft()
        batch, kept, failed = begun.batch.finish()
        self._given = begun.progress
        if failed and config.on_bad_example == "error":
            raise failed[0][1]
        rejected = begun.rejected + decoded_batch.rejected(failed)
        self._undecoded = [] if any(kept) else self._undecoded + [Rejected.of(error, "bad") for _, error in failed]
        self._check_usable(self._undecoded)
        return packing.packed_sequences(batch, kept, rejected, config.sources)

    def _begin_batch(self) -> None:
        """Let the images of a further batch be decoded. Raises StopIteration at the end of the data."""
        count = self.dataset.sequences
        sequences: list[list[Example]] = []
        rejected: list[Rejected] = []
        while len(sequences) < count:
            if not self._queue and not self._next_window():
                break
            rejected += self._rejected
            self._rejected = []
            while self._queue and len(sequences) < count:
                sequence, left_out = self._queue.popleft()
                sequences.append(sequence)
                rejected += left_out
                self._ask(min(self._ahead, self.dataset.window_size - len(self._asked)))
                self._progress = dataclasses.replace(self._progress, given=self._progress.given + 1)
            if not self._queue:
                self._progress = dataclasses.replace(self._progress, done=self._progress.done + 1, given=0)
        if not sequences and not rejected:
            raise StopIteration
        batch = decoded_batch.DecodingBatch(sequences, self._assembled, self._workers.patches)
        self._begun.append(Begun(batch, rejected, self._progress))

    def _assembled(self, sequences: Sequence[Sequence[Example]], write: Write) -> PackedBatch:
        config = self.dataset.config
        return packing.assemble(
            [*sequences, *[[]] * (self.dataset.sequences - len(sequences))],
            config.seq_len,
            config.max_patches,
            patch_values=self.dataset.processor.image_processor.patch_values,
            position_values=self.dataset.processor.model.encoder.position_values,
            max_segment_length=config.max_length,
            max_image_patches=self.dataset.max_image_patches,
            write=write,
            array=self._workers.array,
        )

    def _check_usable(self, left_out: list[Rejected]) -> None:
        """Raise UserError after more examples left out, one after the other, than the data can have."""
        if len(left_out) > 2 * (self.dataset.epoch - 1):  # shuffled, an example comes no later than that
            unusable = {(r.file, r.number): r for r in left_out}
            raise UserError(f"none of the {self.dataset.epoch} examples can be used:\n{grouped(unusable.values())}")

    def _next_window(self) -> bool:
        """Fill the queue from the present window; False at the end of the data."""
        config = self.dataset.config
        window, before = self._progress.item
        size = len(self.dataset.window(window))
        self._ask(size - len(self._asked))
        results = []
        with Waiting(self.dataset.described) as waiting:
            for draw in self.dataset.window(window):
                waiting.now(draw)
                results.append(self._asked.popleft().result())
        results = complete_window(results, config)
        elements = [element for place in results for element in place]
        examples = [e for e in elements if not isinstance(e, Rejected)]
        rejected = [e for e in elements if isinstance(e, Rejected)]
        self._unusable = [] if examples else self._unusable + rejected
        self._check_usable(self._unusable)
        given = max(before, self._progress.given)
        examples = self._joined(examples)
        packed = self._pack(examples)
        if config.shuffle != "none":  # packed longest first: in that order a batch is of one length, often of one kind
            np.random.default_rng(window).shuffle(packed)
        if not packed:
            self._rejected = rejected
        # what a window rejects is reported with its sequences, evenly: the share of what was read is right at any time
        ends = [len(rejected) * number // max(len(packed), 1) for number in range(len(packed) + 1)]
        for number, sequence in enumerate(packed[given:], given):
            self._queue.append(([examples[i] for i in sequence], rejected[ends[number] : ends[number + 1]]))
        self._ahead = -(-self.dataset.window_size // max(len(self._queue), 1))
        self._progress = dataclasses.replace(self._progress, given=given)
        return bool(results)

    def first_window(self) -> list[list[Example]]:
        """Return the packed sequences of the present window that are left, without giving them out."""
        if not self._queue:
            self._next_window()
        return [sequence for sequence, _ in self._queue]

    def _joined(self, examples: list[Example]) -> list[Example]:
        """Documents joined as ``documents.join`` says, those of each source of a mixture apart."""
        config, groups = self.dataset.config, defaultdict(list)
        for example in examples:
            groups[example.origin.source].append(example)
        limits = Limits(config.longest, config.max_patches)
        joins = joins_of(config)
        return [one for name in sorted(groups) for one in joined(groups[name], joins.get(name, 1), limits)]

    def _pack(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the indices of each sequence's examples; with the unit "sequences" each has those of one source."""
        config = self.dataset.config
        groups: dict[str, list[int]] = defaultdict(list)
        for index, example in enumerate(examples):
            groups[example.origin.source if self.dataset.by_source else ""].append(index)
        packed = []
        for _, group in sorted(groups.items()):
            own = packing.best_fit([examples[i] for i in group], config.seq_len, config.max_patches)
            packed += [[group[i] for i in sequence] for sequence in own]
        return packed

    def get_state(self) -> list[dict[str, Any]]:
        """Of this process. A checkpoint gathers those of all, in any order."""
        return [self._given.state()]

    def set_state(self, state: Sequence[dict[str, Any]]) -> None:
        self._begin(go_on(state, self.dataset.share))

    def close(self) -> None:
        super().close()
        self._drop()
        if self._workers is not None:
            self._workers.close()
            self._workers = None


def training_data(
    processor: Processor,
    config: DataConfig,
    *,
    seed: int,
    epochs: int | None = None,
    share: Share = Share(),
    examples: Examples | None = None,
) -> tuple[PrefetchedBatches, Draws]:
    """Return a process's share of a run's batches (endless unless ``epochs`` is given), and the draws they come from.

    Args:
      examples: some of the files' examples; None is all of them.

    Raises:
      ValueError: the sequences of a batch cannot be shared evenly by so many processes.
    """
    packed, draws = _packed(processor, config, seed, epochs, share, examples)
    return PrefetchedBatches(packed, config.prefetch - config.decoded_ahead), draws


def _packed(
    processor: Processor,
    config: DataConfig,
    seed: int,
    epochs: int | None,
    share: Share,
    examples: Examples | None,
    *,
    known: Known | None = None,
) -> tuple[PackDataset, Draws]:
    check_shape(config)
    examples = Examples.open(config) if examples is None else examples
    draws = Draws(examples.with_few_shot(config, seed), config, seed=seed, passes=epochs)
    # of documents that are joined, one that cannot be decoded must be known before
    encode = Encode(processor, config, decode=max(joins_of(config).values()) > 1, known=known)
    encoded = grain.MapDataset.source(draws).map(EncodeDrawn(encode))
    run = draws.windows_in_a_row(config.window(len(draws.examples)), share.count)
    share = dataclasses.replace(share, run=run)
    packed = PackDataset(encoded, draws, processor, config, share.of(config.batch_size), share)
    return packed, draws


def joins_of(config: DataConfig) -> dict[str, int]:
    """Return how many documents of each source share a segment; the one of ``data.train`` has no name."""
    if config.mixture is None:
        return {"": config.documents.join}
    return {name: (source.documents or config.documents).join for name, source in config.mixture.sources().items()}


def first_sequences(
    processor: Processor, config: DataConfig, *, seed: int, known: Known | None = None
) -> tuple[list[list[Example]], Draws]:
    """Return the packed sequences of the first window of a run, whose images are not decoded, and its draws.

    Args:
      known: as of `Encode`. The window can be several passes over few examples.
    """
    packed, draws = _packed(processor, config, seed, None, Share(), None, known=known or Known())
    iterator = iter(packed)
    try:
        return iterator.first_window(), draws
    finally:
        iterator.close()


def check_shape(config: DataConfig) -> None:
    """Raise UserError where the sizes of a sequence are not known yet."""
    if "auto" in (config.seq_len, config.max_patches):
        raise UserError(
            'data.seq_len or data.max_patches is "auto": a run chooses from its data when it starts; give numbers'
        )

"""Packed batches of validation examples: each example once, in the shapes of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jvlm.data import decoded_batch, packing
from jvlm.data.config import DataConfig
from jvlm.data.document_rules import without_drawing
from jvlm.data.encode import Encode, image_patch_limit
from jvlm.data.errors import Rejected
from jvlm.data.mixture.config import Source
from jvlm.data.mixture.examples import Examples
from jvlm.data.packing import Example, PackedSequences
from jvlm.data.pipeline import complete_window
from jvlm.data.position import Share
from jvlm.data.processor import Processor
from jvlm.data.subset import Subset
from jvlm.data.workers import Threads
from jvlm.models.packed_batch import PackedBatch


def _without_drawing(source: Source) -> Source:
    return (
        source if source.documents is None else dataclasses.replace(source, documents=without_drawing(source.documents))
    )


class ValidationData:
    """A process's share of the validation examples of one data source.

    An example that cannot be used, or does not fit as the training data's limits say, is left out and reported.

    Args:
      config: of the training data, whose shapes it has.
      share: of the windows of `DataConfig.pack_window` examples, as processes share the training data.
    """

    def __init__(self, processor: Processor, config: DataConfig, source: Examples | Subset, share: Share = Share()):
        drop = "drop" if config.on_too_long == "error" else config.on_too_long
        # what is measured must not be drawn: whole conversations, in order, with images as they are
        still = {"single_turn_ratio": 0.0, "shuffle_turns": False, "max_turns": None, "upscale_probability": 0.0}
        if config.mixture is not None:
            still["mixture"] = config.mixture.map_sources(_without_drawing)
        # validation has sources of its own, its files; channels are those of training
        curves = "channel" if config.curves == "channel" else "off"
        still |= {"newline_probability": 0.0, "image_choices": (), "documents": without_drawing(config.documents)}
        config = dataclasses.replace(config, **still, curves=curves, on_bad_example="skip", on_too_long=drop)
        self.config, self.source, self.share = config, source, share
        self.processor = processor
        self.encode = Encode(processor, config, decode=False)
        self._values = processor.image_processor.patch_values, processor.model.encoder.position_values
        self._max_image_patches = image_patch_limit(processor.image_processor, processor.image_config, config)

    def __iter__(self) -> Iterator[PackedSequences]:
        config, sequences = self.config, self.share.of(self.config.batch_size)
        waiting: list[list[Example]] = []
        rejected: list[Rejected] = []
        workers = Threads(self, self.processor, config.read_threads)
        try:
            for indices in self._windows():
                results = [workers.example(index) for index in indices]
                places = complete_window([result.result() for result in results], config)
                encoded = [one for place in places for one in place]
                rejected += [one for one in encoded if isinstance(one, Rejected)]
                examples = [one for one in encoded if isinstance(one, Example)]
                packed = packing.best_fit(examples, config.seq_len, config.max_patches)
                waiting += [[examples[i] for i in sequence] for sequence in packed]
                while len(waiting) >= sequences:
                    yield self._batch(waiting[:sequences], rejected, workers)
                    waiting, rejected = waiting[sequences:], []
            if waiting or rejected:
                yield self._batch(waiting, rejected, workers)
        finally:
            workers.close()

    def _windows(self) -> Iterable[range]:
        # small windows, so that every process has some
        size, count = self.config.window(), len(self.source)
        for start in range(self.share.index * size, count, self.share.count * size):
            yield range(start, min(start + size, count))

    def __getitem__(self, index: int) -> tuple[Example | Rejected, ...]:
        """Return what is measured of an example."""
        return self.encode.random_map(self.source[index], np.random.default_rng(index))

    def _batch(
        self, sequences: Sequence[Sequence[Example]], rejected: Sequence[Rejected], workers: Threads
    ) -> PackedSequences:
        batch, kept, failed = decoded_batch.DecodingBatch(sequences, self._assembled, workers.patches).finish()
        rejected = [*rejected, *decoded_batch.rejected(failed)]
        return packing.packed_sequences(batch, kept, rejected, self.config.sources)

    def _assembled(self, sequences: Sequence[Sequence[Example]], write: decoded_batch.Write) -> PackedBatch:
        config = self.config
        return packing.assemble(
            [*sequences, *[[]] * (self.share.of(config.batch_size) - len(sequences))],
            config.seq_len,
            config.max_patches,
            patch_values=self._values[0],
            position_values=self._values[1],
            max_segment_length=config.max_length,
            max_image_patches=self._max_image_patches,
            write=write,
        )

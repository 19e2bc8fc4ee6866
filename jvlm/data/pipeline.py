"""Grain pipeline: examples -> shuffled -> encoded -> packed over tokens and patches -> prefetched batches.

The iterator's state is a small JSON value (jvlm.data.position), good for any number of processes; restoring it costs
one packing window, whatever the size of the data.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from jvlm.data import cutting, document_rules, image_choice, packing, preferences
from jvlm.data.augmentation import augmented
from jvlm.data.config import DataConfig
from jvlm.data.content import Conversation, Document
from jvlm.data.cutting import Limits
from jvlm.data.errors import ExampleError, Origin, Rejected, SkippedError, grouped
from jvlm.data.examples import parse_example
from jvlm.data.image_processor import ImageProcessor, ImageProcessorConfig
from jvlm.data.joining import joined
from jvlm.data.loss_choice import with_loss_on
from jvlm.data.mixture.examples import Drawn, Draws, Examples, mixture_of
from jvlm.data.packing import Example, PackedSequences
from jvlm.data.position import Progress, Share, go_on
from jvlm.data.processor import Processor
from jvlm.data.shrink import shrink
from jvlm.data.sources import SourceNumbers
from jvlm.data.turns import single_turns
from jvlm.errors import UserError


class Encode(grain.transforms.RandomMap):
    """(origin, example) to what is trained on of it, and a `Rejected` where the config allows leaving examples out.

    An example of the data is one `Example`, or a `Rejected`; a document may be cut into several.
    """

    def __init__(self, processor: Processor, config: DataConfig):
        self.processor, self.config = processor, config
        self.sources = SourceNumbers(config)
        self._losses = {name: source.loss for name, source in mixture_of(config).sources().items() if source.loss}
        check_choices(processor, config)

    def random_map(self, element: tuple[Origin, Any], rng: np.random.Generator) -> tuple[Example | Rejected, ...]:
        try:
            read = self.read(element, rng)
            source = self.sources.of(read[0][0])
        except ExampleError as error:
            if self.config.on_bad_example == "error" and not isinstance(error, SkippedError):
                raise
            return (Rejected.of(error, "bad"),)
        fitted = self.fit(read, rng)
        return tuple(one if isinstance(one, Rejected) else dataclasses.replace(one, source=source) for one in fitted)

    def read(
        self, element: tuple[Origin, Any], rng: np.random.Generator
    ) -> list[tuple[Conversation | Document, Example]]:
        """Return an example with what has a loss, whatever its length. Raises ExampleError.

        It is one example, but for a document with more than ``documents.max_images``.
        """
        origin, record = element
        if isinstance(record, ExampleError):
            raise record
        parsed = parse_example(record, origin)
        if self.config.preference != "none":
            return [self._judged(parsed)]
        if isinstance(parsed, Document):
            document_rules.check_order(parsed, self.config.documents)
        single = rng.random() < self.config.single_turn_ratio
        parsed = augmented(parsed, self.config, rng)
        parsed = with_loss_on(parsed, self._losses.get(origin.source, self.config.loss))
        if isinstance(parsed, Document):
            return self._parts(parsed, rng)
        if single:
            parsed = _one_turn(parsed, rng)
        example = self.processor.encode(parsed)
        check_learnable(example.origin, example.loss_weights)
        return [(parsed, example)]

    def _judged(self, parsed: Conversation | Document) -> tuple[Conversation, Example]:
        """Return a pair, or an answer with a label, as the segments of one example."""
        read = preferences.pair if self.config.preference == "pairs" else preferences.labelled
        judged = read(parsed, self._losses.get(parsed.origin.source, self.config.loss))
        example = self.processor.encode_together(judged.conversations, judged.values)
        for number in range(1, example.num_segments + 1):
            check_learnable(example.origin, example.loss_weights[example.segments == number])
        if self.config.preference == "pairs":
            example = preferences.with_answer_numbers(example)
        return judged.conversations[0], example

    def _parts(self, document: Document, rng: np.random.Generator) -> list[tuple[Document, Example]]:
        """Return a document, with no more media than it may have."""
        check_text(document)
        config = self.config.documents
        if config.cut == "split":
            parts = cutting.split_by_media(document, config.max_images)
        elif config.cut == "sample_window":
            parts = [cutting.window_by_media(document, config.max_images, config.window_bonus, rng)]
        else:
            parts = [document]
        cut = "no" if parts == [document] else "cut"
        read = [(part, dataclasses.replace(self.processor.encode(part), made_to_fit=cut)) for part in parts]
        document_rules.check_sizes(document, [size for _, example in read for size in example.sizes], config)
        return read

    def fit(
        self, read: Sequence[tuple[Conversation | Document, Example]], rng: np.random.Generator
    ) -> list[Example | Rejected]:
        """Return what was read of an example, made to fit sequences as ``on_too_long`` and ``documents.cut`` say.

        Raises:
          ExampleError: one that does not fit, where ``on_too_long`` is "error".
        """
        if isinstance(read[0][0], Conversation) or self.config.documents.cut == "never":
            return [self._fitted(parsed, dataclasses.replace(example, breaks=None)) for parsed, example in read]
        fitted = [self._fitted_part(one) for document, example in read for one in self._cut(document, example, rng)]
        used = [number for number, one in enumerate(fitted) if isinstance(one, Example)]
        whole = used[0] if used else 0  # which stands for the example where examples are counted
        return [
            dataclasses.replace(one, records=int(number == whole))
            if isinstance(one, Example)
            else one
            if number == whole
            else dataclasses.replace(one, kind="part")
            for number, one in enumerate(fitted)
        ]

    def _cut(self, document: Document, example: Example, rng: np.random.Generator) -> list[Example]:
        """Return a document as parts that fit, but for media that do not fit alone."""
        parts = self._split(example)
        if self.config.on_too_long == "shrink" and not all(map(self._fits, parts)):
            shrunk = shrink(self.processor, document, lambda one: all(map(self._fits, self._split(one))))
            if shrunk is not None:
                example = dataclasses.replace(shrunk, made_to_fit="cut" if example.made_to_fit == "cut" else "shrunk")
                parts = self._split(example)
        config = self.config.documents
        if config.cut == "split":
            return parts
        if example.made_to_fit == "cut":  # a window that was drawn already
            return parts[:1]
        return [cutting.window(example, *self._limits, config.window_bonus, rng)]

    def _split(self, example: Example) -> list[Example]:
        return cutting.split(example, *self._limits)

    @property
    def _limits(self) -> tuple[cutting.Limits, cutting.Beginning]:
        processor = self.processor
        beginning = cutting.Beginning(processor.documents.begin_ids, processor.merged_delimiter_id)
        return cutting.Limits(self.config.longest, self.config.max_patches), beginning

    def _fitted_part(self, example: Example) -> Example | Rejected:
        try:
            self._check(example)
        except ExampleError as error:
            if self.config.on_too_long == "error":
                raise
            return Rejected.of(error, "too_long")
        if not example.loss_weights.any():
            problem, fix = "a part without text, in which nothing has a loss", "Make the images smaller"
            return Rejected.of(ExampleError(example.origin, "document", problem, fix), "too_long")
        return example

    def _fitted(self, parsed: Conversation | Document, example: Example) -> Example | Rejected:
        try:
            self._check(example)
        except ExampleError as error:
            if self.config.on_too_long == "error":
                raise
            return self._made_to_fit(parsed, example) or Rejected.of(error, "too_long")
        return example

    def _made_to_fit(self, parsed: Conversation | Document, example: Example) -> Example | None:
        config = self.config
        if config.on_too_long == "truncate":
            shorter = packing.truncate(example, config.longest, config.max_patches)
            return shorter if shorter is not None and self._fits(shorter) else None
        if config.on_too_long == "shrink" and example.num_patches:
            return shrink(self.processor, parsed, self._fits)
        return None

    def _check(self, example: Example) -> None:
        config = self.config
        most = image_patch_limit(self.processor.image_processor, self.processor.image_config, config)
        packing.check_fits(example, config.seq_len, config.max_patches, config.max_length, most)

    def _fits(self, example: Example) -> bool:
        try:
            self._check(example)
        except ExampleError:
            return False
        return True


class EncodeDrawn(grain.transforms.Map):
    """As `Encode`, with random numbers that depend on the example's source and on how often that was drawn before."""

    def __init__(self, encode: Encode):
        self.encode = encode

    def map(self, drawn: Drawn) -> tuple[Example | Rejected, ...]:
        return self.encode.random_map((drawn.origin, drawn.record), np.random.default_rng(drawn.seed))


def complete_window(places: Sequence[Sequence[Example | Rejected]], config: DataConfig) -> Sequence[Sequence]:
    """Return what the examples of a packing window gave, with what depends on their neighbours."""
    if config.preference != "labels":
        return places
    return preferences.with_other_answers(places, config.seq_len, config.longest)


def _one_turn(conversation: Conversation, rng: np.random.Generator) -> Conversation:
    """Return a turn drawn in proportion to its loss weight; the conversation as it is if none has any."""
    turns = [turn for turn in single_turns(conversation) if turn.messages[-1].loss_weight > 0]
    if not turns:
        return conversation
    weights = np.asarray([turn.messages[-1].loss_weight for turn in turns])
    return turns[rng.choice(len(turns), p=weights / weights.sum())]


def check_learnable(origin: Origin, weights: Sequence[float] | np.ndarray) -> None:
    """Raise ExampleError if no turn, or no token, has a loss weight above 0."""
    if not np.any(np.asarray(weights) > 0):
        raise ExampleError(origin, "messages", "no assistant turn to learn from", "Add one, or set its loss true")


def check_text(document: Document) -> None:
    """Raise ExampleError for a document without text."""
    if not document.text.strip():
        raise ExampleError(document.origin, "document", "no text, so nothing has a loss", "Add some, or leave it out")


class _Windows(grain.MapDataset):
    """The examples of a process's windows, from its present one on. Places after the end of the data are None."""

    def __init__(self, parent: grain.MapDataset, window: int, progress: Progress):
        super().__init__(parent)
        self.window, self.progress = window, progress

    def __len__(self) -> int:
        count = len(self._parent)
        if count >= sys.maxsize // 2:
            return sys.maxsize
        position, share = self.progress.position, self.progress.share
        items = len(position.open) + max(-(-count // self.window) - position.next, 0)
        mine = -(-(items - share.index) // share.count) - self.progress.done
        return max(mine, 0) * self.window

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        item, within = divmod(index, self.window)
        window, _ = dataclasses.replace(self.progress, done=self.progress.done + item).item
        index = window * self.window + within
        return self._parent[index] if index < len(self._parent) else None


class PackDataset(grain.IterDataset):
    """Packs a process's share of the encoded examples into batches.

    Args:
      sequences: packed sequences of a batch.
      epoch: examples of the data.

    Iterating raises UserError where none of the examples gives anything to learn from.
    """

    def __init__(
        self,
        parent: grain.MapDataset,
        config: DataConfig,
        sequences: int,
        share: Share,
        patch_values: int,
        position_values: int,
        max_image_patches: int | None,
        epoch: int,
    ):
        super().__init__(parent)
        self.config, self.sequences, self.share, self.epoch = config, sequences, share, epoch
        self.patch_values, self.position_values = patch_values, position_values
        self.max_image_patches = max_image_patches
        self.by_source = mixture_of(config).unit == "sequences"

    def __iter__(self) -> PackIterator:
        return PackIterator(self)

    def stream(self, progress: Progress) -> grain.DatasetIterator:
        """Examples and rejected examples from the present window on."""
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
        """Examples of a window; fewer, or none, at the end of the data."""
        return max(0, min(self.config.pack_window, len(self._parent) - window * self.config.pack_window))


class PackIterator(grain.DatasetIterator):
    """Packs a window at a time, best fit; the last batch is filled with empty sequences.

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
        self._unusable: list[Rejected] = []  # examples left out since the last that was used

    def __next__(self) -> PackedSequences:
        config, count = self.dataset.config, self.dataset.sequences
        sequences: list[list[Example]] = []
        rejected: list[Rejected] = []
        while len(sequences) < count:
            if not self._queue and not self._next_window():
                break
            rejected += self._rejected
            self._rejected = []
            while self._queue and len(sequences) < count:
                sequences.append(self._queue.popleft())
                self._progress = dataclasses.replace(self._progress, given=self._progress.given + 1)
            if not self._queue:
                self._progress = dataclasses.replace(self._progress, done=self._progress.done + 1, given=0)
        if not sequences and not rejected:
            raise StopIteration
        batch = packing.assemble(
            sequences + [[]] * (count - len(sequences)),
            config.seq_len,
            config.max_patches,
            patch_values=self.dataset.patch_values,
            position_values=self.dataset.position_values,
            max_segment_length=config.max_length,
            max_image_patches=self.dataset.max_image_patches,
        )
        return packing.packed_sequences(batch, sequences, rejected, config.sources)

    def _next_window(self) -> bool:
        """Fill the queue from the present window; False at the end of the data."""
        config = self.dataset.config
        window, before = self._progress.item
        places = [next(self._stream) for _ in range(self.dataset.window_size(window))]
        places = complete_window(places, config)
        elements = [element for place in places for element in place]
        examples = [e for e in elements if not isinstance(e, Rejected)]
        rejected = [e for e in elements if isinstance(e, Rejected)]
        self._unusable = [] if examples else self._unusable + rejected
        if len(self._unusable) > 2 * (self.dataset.epoch - 1):  # shuffled, an example comes no later than that
            unusable = {(r.file, r.number): r for r in self._unusable}
            raise UserError(f"none of the {self.dataset.epoch} examples can be used:\n{grouped(unusable.values())}")
        given = max(before, self._progress.given)
        if not given:  # what a window rejects is reported with its first sequence
            self._rejected = rejected
        examples = self._joined(examples)
        packed = self._pack(examples)
        if config.shuffle != "none":  # packed longest first: in that order a batch is of one length, often of one kind
            np.random.default_rng(window).shuffle(packed)
        self._queue.extend([examples[i] for i in sequence] for sequence in packed[given:])
        self._progress = dataclasses.replace(self._progress, given=given)
        return bool(places)

    def _joined(self, examples: list[Example]) -> list[Example]:
        """Documents joined as ``documents.join`` says, those of each source of a mixture apart."""
        config, groups = self.dataset.config, defaultdict(list)
        for example in examples:
            groups[example.origin.source].append(example)
        limits = Limits(config.longest, config.max_patches)
        return [one for name in sorted(groups) for one in joined(groups[name], config.documents.join, limits)]

    def _pack(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the indices of each sequence's examples; with the unit "sequences" each has those of one source."""
        config = self.dataset.config
        groups: dict[str, list[int]] = defaultdict(list)
        for index, example in enumerate(examples):
            groups[example.origin.source if self.dataset.by_source else ""].append(index)
        packed = []
        for _, group in sorted(groups.items()):
            own = packing.best_fit_decreasing([examples[i] for i in group], config.seq_len, config.max_patches)
            packed += [[group[i] for i in sequence] for sequence in own]
        return packed

    def get_state(self) -> list[dict[str, Any]]:
        """Of this process. A checkpoint gathers those of all, in any order."""
        return [self._progress.state()]

    def set_state(self, state: Sequence[dict[str, Any]]) -> None:
        self._begin(go_on(state, self.dataset.share))

    def close(self) -> None:
        super().close()
        self._stream.close()


def training_data(
    processor: Processor,
    config: DataConfig,
    *,
    seed: int,
    epochs: int | None = None,
    share: Share = Share(),
    examples: Examples | None = None,
) -> tuple[grain.IterDataset, Draws]:
    """Return a process's share of a run's batches (endless unless ``epochs`` is given), and the draws they come from.

    Args:
      examples: some of the files' examples; None is all of them.

    Raises:
      ValueError: the sequences of a batch cannot be shared evenly by so many processes.
    """
    check_shape(config)
    examples = Examples.open(config) if examples is None else examples
    draws = Draws(examples.with_few_shot(config.few_shot, seed), config, seed=seed, passes=epochs)
    encoded = grain.MapDataset.source(draws).map(EncodeDrawn(Encode(processor, config)))
    values = processor.image_processor.patch_values, processor.model.encoder.position_values
    most = image_patch_limit(processor.image_processor, processor.image_config, config)
    packed = PackDataset(encoded, config, share.of(config.batch_size), share, *values, most, len(draws.examples))
    return grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=config.prefetch), draws


def image_configs(settings: ImageProcessorConfig, config: DataConfig) -> list[ImageProcessorConfig]:
    """Return the settings of images that examples may get. Raises UserError for a choice that they do not know."""
    choices = map(image_choice.settings_of, config.image_choices)
    return [image_choice.changed(settings, choice) for choice in choices] or [settings]


def check_choices(processor: Processor, config: DataConfig) -> None:
    """Raise UserError for choices of image settings that this model's processor does not know."""
    image_configs(processor.image_config, config)


def check_shape(config: DataConfig) -> None:
    """Raise UserError where the sizes of a sequence are not known yet."""
    if "auto" in (config.seq_len, config.max_patches):
        raise UserError(
            'data.seq_len or data.max_patches is "auto": a run chooses from its data when it starts; give numbers'
        )


def image_patch_limit(images: ImageProcessor, settings: ImageProcessorConfig, config: DataConfig) -> int | None:
    """Return the length promised to attention for images, which each example is checked against; None: no promise."""
    most = config.max_image_patches
    if most is None:
        limits = [images.max_image_patches(one) for one in image_configs(settings, config)]
        most = None if None in limits else max(limits)
    return most if most is not None and most < config.max_patches else None

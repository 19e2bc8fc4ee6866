"""Grain pipeline: examples -> shuffled -> encoded -> packed over tokens and patches -> decoded -> prefetched batches.

Examples are encoded from the headers of their images, and a window of them is packed; images are decoded when their
sequence is given out. So a window may be long, which fills sequences, and takes little memory.

The iterator's state is a small JSON value (jvlm.data.position), good for any number of processes; restoring it costs
one packing window, whatever the size of the data.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from jvlm.data import cutting, decoded_batch, document_rules, image_choice, packing, preferences
from jvlm.data.augmentation import augmented
from jvlm.data.config import DataConfig
from jvlm.data.content import Conversation, Document
from jvlm.data.cutting import Limits
from jvlm.data.decoded_batch import Begun, Write
from jvlm.data.document_config import DocumentConfig
from jvlm.data.errors import ExampleError, Origin, Rejected, SkippedError, grouped
from jvlm.data.examples import parse_example
from jvlm.data.image_processor import ImageProcessor, ImageProcessorConfig
from jvlm.data.joining import joined
from jvlm.data.loss_choice import with_loss_on
from jvlm.data.mixture.config import Source
from jvlm.data.mixture.examples import Drawn, Draws, Examples, config_of, mixture_of
from jvlm.data.packing import Example, PackedSequences
from jvlm.data.position import Progress, Share, go_on
from jvlm.data.prefetch import PrefetchedBatches
from jvlm.data.processor import Processor
from jvlm.data.shrink import shrink
from jvlm.data.sources import SourceNumbers
from jvlm.data.turns import single_turns
from jvlm.data.waiting import Waiting
from jvlm.data.workers import Result, Workers, workers_of
from jvlm.errors import UserError
from jvlm.models.packed_batch import PackedBatch


class Encode(grain.transforms.RandomMap):
    """(origin, example) to what is trained on of it, and a `Rejected` where the config allows leaving examples out.

    An example of the data is one `Example`, or a `Rejected`; a document may be cut into several.

    Args:
      decode: as of `Processor.encode`.
    """

    def __init__(self, processor: Processor, config: DataConfig, *, decode: bool = True):
        given = {
            "video": config.video,
            "media_folders": config.media_folders,
            "still_images": config.animated_images == "error",
        }
        if any(getattr(processor, name) != value for name, value in given.items()):
            processor = processor.replace(**given)
        self.processor, self.config, self.decode = processor, config, decode
        self.sources = SourceNumbers(config)
        sources = mixture_of(config).sources()
        self._losses = {name: source.loss for name, source in sources.items() if source.loss}
        # of sources with settings of their own
        self._own = {
            name: self._of_source(source) for name, source in sources.items() if source.documents or source.media_root
        }
        check_choices(processor, config)

    def documents_of(self, origin: Origin) -> DocumentConfig:
        """Return how the documents of an example's source are read."""
        return self._own.get(origin.source, self).config.documents

    def _of_source(self, source: Source) -> Encode:
        config, processor = dataclasses.replace(config_of(self.config, source), curves="off"), self.processor
        if source.media_root:
            processor = processor.replace(media_roots=(source.media_root,))
        return Encode(processor, config, decode=self.decode)

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
    ) -> list[tuple[Conversation | Document | preferences.Judged, Example]]:
        """Return an example with what has a loss, whatever its length. Raises ExampleError.

        It is one example, but for a document with more than ``documents.max_images``.
        """
        origin, record = element
        if origin.source in self._own:
            return self._own[origin.source].read(element, rng)
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
        example = self.processor.encode(parsed, decode=self.decode)
        check_learnable(example.origin, example.loss_weights)
        return [(parsed, example)]

    def _judged(self, parsed: Conversation | Document) -> tuple[preferences.Judged, Example]:
        """Return a pair, or an answer with a label, as the segments of one example."""
        read = preferences.pair if self.config.preference == "pairs" else preferences.labelled
        judged = read(parsed, self._losses.get(parsed.origin.source, self.config.loss))
        return judged, self._together(judged)

    def _together(self, judged: preferences.Judged, image_config: ImageProcessorConfig | None = None) -> Example:
        # the numbers of answers are taken of their pixels
        decode = self.decode or self.config.preference == "pairs"
        example = self.processor.encode_together(
            judged.conversations, judged.values, image_config=image_config, decode=decode
        )
        for number in range(1, example.num_segments + 1):
            check_learnable(example.origin, example.loss_weights[example.segments == number])
        return preferences.with_answer_numbers(example) if self.config.preference == "pairs" else example

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
        encoded = [self.processor.encode(part, decode=self.decode) for part in parts]
        read = [(part, dataclasses.replace(one, made_to_fit=cut)) for part, one in zip(parts, encoded, strict=True)]
        document_rules.check_sizes(document, [size for _, example in read for size in example.sizes], config)
        return read

    def fit(
        self, read: Sequence[tuple[Conversation | Document | preferences.Judged, Example]], rng: np.random.Generator
    ) -> list[Example | Rejected]:
        """Return what was read of an example, made to fit sequences as ``on_too_long`` and ``documents.cut`` say.

        Raises:
          ExampleError: one that does not fit, where ``on_too_long`` is "error".
        """
        parsed = read[0][0]
        if parsed.origin.source in self._own:
            return self._own[parsed.origin.source].fit(read, rng)
        if not isinstance(parsed, Document) or self.config.documents.cut == "never":
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
            fits = lambda one: all(map(self._fits, self._split(one)))  # noqa: E731
            shrunk = shrink(self.processor, document, fits, decode=self.decode)
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

    def _fitted(self, parsed: Conversation | Document | preferences.Judged, example: Example) -> Example | Rejected:
        try:
            self._check(example)
        except ExampleError as error:
            if self.config.on_too_long == "error":
                raise
            return self._made_to_fit(parsed, example) or Rejected.of(error, "too_long")
        return example

    def _made_to_fit(self, parsed: Conversation | Document | preferences.Judged, example: Example) -> Example | None:
        config = self.config
        if config.on_too_long == "truncate":
            shorter = packing.truncate(example, config.longest, config.max_patches)
            return shorter if shorter is not None and self._fits(shorter) else None
        if config.on_too_long == "shrink" and example.num_patches:
            if isinstance(parsed, preferences.Judged):
                together = functools.partial(self._together, parsed)
                return shrink(self.processor, parsed.conversations[0], self._fits, encode=together)
            return shrink(self.processor, parsed, self._fits, decode=self.decode)
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


def complete_window(results: Sequence[Sequence[Example | Rejected]], config: DataConfig) -> Sequence[Sequence]:
    """Return what the examples of a packing window gave, with what depends on their neighbours."""
    if config.preference != "labels":
        return results
    return preferences.with_other_answers(results, config.seq_len, config.longest)


def _one_turn(conversation: Conversation, rng: np.random.Generator) -> Conversation:
    """Return a turn drawn in proportion to its loss weight; the conversation as it is if none has any."""
    turns = [turn for turn in single_turns(conversation) if turn.messages[-1].loss_weight > 0]
    if not turns:
        return conversation
    weights = np.asarray([turn.messages[-1].loss_weight for turn in turns])
    return turns[rng.choice(len(turns), p=weights / weights.sum())]


def check_learnable(origin: Origin, weights: Sequence[float] | Float[np.ndarray, " n"]) -> None:
    """Raise ExampleError if no turn, or no token, has a loss weight above 0."""
    if not np.any(np.asarray(weights) > 0):
        raise ExampleError(origin, "messages", "no assistant turn to learn from", "Add one, or set its loss true")


def check_text(document: Document) -> None:
    """Raise ExampleError for a document without text."""
    if not document.text.strip():
        raise ExampleError(document.origin, "document", "no text, so nothing has a loss", "Add some, or leave it out")


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
        self._queue: deque[list[Example]] = deque()
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
                sequences.append(self._queue.popleft())
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
        if not given:  # what a window rejects is reported with its first sequence
            self._rejected = rejected
        examples = self._joined(examples)
        packed = self._pack(examples)
        if config.shuffle != "none":  # packed longest first: in that order a batch is of one length, often of one kind
            np.random.default_rng(window).shuffle(packed)
        self._queue.extend([examples[i] for i in sequence] for sequence in packed[given:])
        self._ahead = -(-self.dataset.window_size // max(len(self._queue), 1))
        self._progress = dataclasses.replace(self._progress, given=given)
        return bool(results)

    def first_window(self) -> list[list[Example]]:
        """Return the packed sequences of the present window that are left, without giving them out."""
        if not self._queue:
            self._next_window()
        return list(self._queue)

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
) -> tuple[PackDataset, Draws]:
    check_shape(config)
    examples = Examples.open(config) if examples is None else examples
    draws = Draws(examples.with_few_shot(config, seed), config, seed=seed, passes=epochs)
    # of documents that are joined, one that cannot be decoded must be known before
    encode = Encode(processor, config, decode=max(joins_of(config).values()) > 1)
    encoded = grain.MapDataset.source(draws).map(EncodeDrawn(encode))
    packed = PackDataset(encoded, draws, processor, config, share.of(config.batch_size), share)
    return packed, draws


def joins_of(config: DataConfig) -> dict[str, int]:
    """Return how many documents of each source share a segment; the one of ``data.train`` has no name."""
    if config.mixture is None:
        return {"": config.documents.join}
    return {name: (source.documents or config.documents).join for name, source in config.mixture.sources().items()}


def first_sequences(processor: Processor, config: DataConfig, *, seed: int) -> tuple[list[list[Example]], Draws]:
    """Return the packed sequences of the first window of a run, whose images are not decoded, and its draws."""
    packed, draws = _packed(processor, config, seed, None, Share(), None)
    iterator = iter(packed)
    try:
        return iterator.first_window(), draws
    finally:
        iterator.close()


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

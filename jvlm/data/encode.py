"""Examples encoded as a run wants them: read, changed as is drawn for them, and made to fit packed sequences."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from jvlm.data import cutting, document_rules, image_choice, packing, preferences
from jvlm.data.augmentation import augmented
from jvlm.data.config import DataConfig
from jvlm.data.content import Conversation, Document
from jvlm.data.document_config import DocumentConfig
from jvlm.data.errors import ExampleError, Origin, Rejected, SkippedError
from jvlm.data.examples import parse_example
from jvlm.data.image_processor import ImageProcessor, ImageProcessorConfig
from jvlm.data.images import unwrap
from jvlm.data.loss_choice import with_loss_on
from jvlm.data.mixture.config import Source
from jvlm.data.mixture.examples import Drawn, config_of, mixture_of
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.data.shrink import shrink
from jvlm.data.sources import SourceNumbers
from jvlm.data.turns import single_turns
from jvlm.data.unread_patches import UnreadImage, UnreadPatches
from jvlm.units import MIB

# a document's images are what cannot be cut
_TOO_LONG = "Raise data.seq_len, make the images smaller, or set data.on_too_long to shrink (images are resized)"
_KNOWN_BYTES = 128 * MIB  # of the examples that are kept
_TOKEN_BYTES = 64  # of a token, about: ids, weights, positions


Read = list[tuple[Conversation | Document | preferences.Judged, Example]]


class Known:
    """What the first examples of a source gave when they were read, for those who look at them more than once.

    Pixels are not kept: images are decoded when they are asked for, and frames of videos, which were, are zeros.
    """

    def __init__(self):
        self._read: dict[Origin, Read] = {}
        self._bytes = 0

    def get(self, origin: Origin) -> Read | None:
        """Return what an example gave; None if it was not kept."""
        return self._read.get(origin)

    def keep(self, origin: Origin, read: Read) -> None:
        """Keep what an example gave, but for pixels, while there is room."""
        size = sum(_bytes(example) for _, example in read)
        if self._bytes + size <= _KNOWN_BYTES:
            self._bytes += size
            self._read[origin] = [(parsed, _without_pixels(example)) for parsed, example in read]


class Encode(grain.transforms.RandomMap):
    """(origin, example) to what is trained on of it, and a `Rejected` where the config allows leaving examples out.

    An example of the data is one `Example`, or a `Rejected`; a document may be cut into several.

    Args:
      decode: as of `Processor.encode`.
      known: keeps what examples give, and gives it again, if nothing is drawn for them. Who shares it reads the same
        examples with the same settings, but for those of sequences.
    """

    def __init__(self, processor: Processor, config: DataConfig, *, decode: bool = True, known: Known | None = None):
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
        self._known = None if self._draws() else known

    def _draws(self) -> bool:
        """Whether anything is drawn for an example, so that each pass gives another one."""
        config = self.config
        own = any(one._draws() for one in self._own.values())
        return own or bool(config.drawn) or config.documents.cut == "sample_window"

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

    def read(self, element: tuple[Origin, Any], rng: np.random.Generator) -> Read:
        """Return an example with what has a loss, whatever its length. Raises ExampleError.

        It is one example, but for a document with more than ``documents.max_images``.
        """
        if self._known is None:
            return self._read(element, rng)
        read = self._known.get(element[0])
        if read is None:
            read = self._read(element, rng)
            self._known.keep(element[0], read)
        return read

    def _read(self, element: tuple[Origin, Any], rng: np.random.Generator) -> Read:
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
            if error.field == "messages":
                error = ExampleError(error.origin, "document", error.problem, _TOO_LONG)
            if self.config.on_too_long == "error":
                raise error from None
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


def _bytes(example: Example) -> int:
    """Return about how much memory an example takes whose images are not decoded, those that it holds included."""
    pieces = example.patches.pieces if isinstance(example.patches, UnreadPatches) else ()
    sources = (unwrap(piece.part.source) for piece in pieces if isinstance(piece, UnreadImage))
    return _TOKEN_BYTES * example.length + sum(len(source) for source in sources if isinstance(source, bytes))


def _without_pixels(example: Example) -> Example:
    patches = example.patches
    if isinstance(patches, UnreadPatches):
        pieces = tuple(piece if isinstance(piece, UnreadImage) else _zeros(piece) for piece in patches.pieces)
        return dataclasses.replace(example, patches=dataclasses.replace(patches, pieces=pieces))
    return dataclasses.replace(example, patches=_zeros(patches))


def _zeros(patches: np.ndarray) -> np.ndarray:
    """Return zeros of the same shape that take no memory."""
    return np.broadcast_to(np.zeros((), patches.dtype), patches.shape)


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


def image_configs(settings: ImageProcessorConfig, config: DataConfig) -> list[ImageProcessorConfig]:
    """Return the settings of images that examples may get. Raises UserError for a choice that they do not know."""
    choices = map(image_choice.settings_of, config.image_choices)
    return [image_choice.changed(settings, choice) for choice in choices] or [settings]


def check_choices(processor: Processor, config: DataConfig) -> None:
    """Raise UserError for choices of image settings that this model's processor does not know."""
    image_configs(processor.image_config, config)


def image_patch_limit(images: ImageProcessor, settings: ImageProcessorConfig, config: DataConfig) -> int | None:
    """Return the length promised to attention for images, which each example is checked against; None: no promise."""
    most = config.max_image_patches
    if most is None:
        limits = [images.max_image_patches(one) for one in image_configs(settings, config)]
        most = None if None in limits else max(limits)
    return most if most is not None and most < config.max_patches else None

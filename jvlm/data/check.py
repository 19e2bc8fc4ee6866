"""Looking at data before training on it: which examples training would reject and why, and what the others are like."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jvlm.data import survey
from jvlm.data.boxes import Sizes
from jvlm.data.check_report import CheckReport
from jvlm.data.columns import UnknownColumns
from jvlm.data.config import DataConfig
from jvlm.data.content import Conversation, Document, Image, Video, media_sources
from jvlm.data.contents import Contents, contents_of
from jvlm.data.encode import Encode, Known, check_learnable, check_text
from jvlm.data.errors import ExampleError, Origin, Rejected
from jvlm.data.example_source import ExampleSource, Read
from jvlm.data.examples import parse_example, unknown_columns
from jvlm.data.few_shot import FewShotSource
from jvlm.data.images import content_digest, open_image
from jvlm.data.packing import Example
from jvlm.data.prepare.held_out import HeldOut, HeldOutCounts, Shared
from jvlm.data.prepare.image_hash import ImageHash
from jvlm.data.processor import Processor
from jvlm.data.rejections import Rejections
from jvlm.data.unread_patches import UnreadImage, UnreadPatches
from jvlm.data.video.reader import shared_reader
from jvlm.data.video.sampling import Sampling
from jvlm.errors import UserError
from jvlm.progress import Progress

_LOOKED_AT = 512  # examples of the sample that unknown sizes are chosen from, as in training
_TOGETHER = 64  # examples in memory at a time
_SAMPLE = 10_000  # examples from which sizes of packed sequences are suggested


def check(
    files: Sequence[str],
    processor: Processor | None,
    config: DataConfig = DataConfig(),
    *,
    seed: int = 0,
    on_rejected: Callable[[Rejected], None] | None = None,
    on_checked: Callable[[int, Checked], None] | None = None,
    digests: bool = False,
    hashed: int = 0,
    known: Known | None = None,
    held_out: HeldOut | None = None,
) -> CheckReport:
    """Read every example and its media as training would. Memory does not grow with the size of the files.

    Args:
      processor: also encodes; without one, examples are checked and images decoded only.
      config: of the training. Its ``single_turn_ratio`` is not drawn: whole conversations are checked.
      seed: of the training, which draws the sample that unknown sizes are chosen from.
      on_rejected: is given each rejected example, in place of the report.
      on_checked: is given the index of each example, in order, and what it is like.
      digests: whether that holds the digests of its images, and its contents.
      known: as of `Encode`.
      hashed: of so many first examples it holds perceptual hashes of the images, too.
      held_out: sets of which the report says what the usable examples share with them.

    Raises:
      FileNotFoundError, UserError: files that are not there, damaged, or of which too little can be used.
    """
    config = dataclasses.replace(config, train=tuple(files), single_turn_ratio=0.0)
    source = source_of(config, seed)
    look = _Look(processor, config, seed, digests=digests, known=known or Known(), held_out=held_out)
    shared = HeldOutCounts(held_out)
    tally, rejected = Tally(), []
    with (
        ThreadPoolExecutor(config.read_threads) as pool,
        Progress(total=len(source), desc="checking", unit="example") as bar,
    ):
        for start in range(0, len(source), _TOGETHER):
            numbers = range(start, min(start + _TOGETHER, len(source)))
            bar.update(len(numbers))
            checks = pool.map(lambda number: look.at(source.read(number), is_hashed=number < hashed), numbers)
            for number, checked in zip(numbers, checks, strict=True):
                tally.add(checked)
                shared.add(checked.shared)
                if on_checked is not None:
                    on_checked(number, checked)
                example = checked.rejected
                if example is not None and on_rejected is not None:
                    on_rejected(example)
                elif example is not None:
                    rejected.append(
                        ExampleError(Origin(example.file, example.number), example.field, example.reason, example.fix)
                    )
    return CheckReport(
        examples=len(source),
        rejected=tuple(rejected),
        config=look.config,
        encoded=processor is not None,
        columns=tuple(tally.column_lines()),
        suggestion=_suggestion(tally, look),
        formats=tuple(source.formats()),
        held_out=tuple(shared.lines()),
        **{name: getattr(tally, name) for name in _TALLIED},
    )


# of a report, what is counted one example after the other
_TALLIED = (
    "faults tokens media_tokens images patches loss_tokens changed documents cut parts parts_left_out untagged".split()
)


def source_of(config: DataConfig, seed: int) -> ExampleSource | FewShotSource:
    """Return the examples of ``config.train``, with their demonstrations where ``config.few_shot`` is given."""
    source = ExampleSource.of(config)
    return source if config.few_shot is None else FewShotSource(source, config.few_shot, seed)


def encoded(
    encode: Encode, parsed: Conversation | Document
) -> tuple[list[tuple[Conversation | Document, Example]], list[Example | Rejected]]:
    """Return (what is read of an example, the same made to fit sequences), with draws that do not change.

    Raises:
      ExampleError: an example that cannot be read.
    """
    rng = np.random.default_rng(0)
    read = encode.read((parsed.origin, parsed), rng)
    try:
        return read, encode.fit(read, rng)
    except ExampleError as error:
        return read, [Rejected.of(error, "too_long")]


@dataclasses.dataclass
class Checked:
    """What one example is like, without its contents; of an example that cannot be read, only what could be."""

    file: str
    rejected: Rejected | None = None
    columns: tuple[str, ...] | None = None  # those that jvlm does not know
    images: int = 0
    sizes: list[survey.Size] = dataclasses.field(default_factory=list)  # of what it is packed as
    media_tokens: list[int] = dataclasses.field(default_factory=list)
    loss_tokens: int = 0
    turns: int = 0  # of an assistant
    is_document: bool = False
    parts: int = 0  # of a document that was cut
    parts_left_out: list[Rejected] = dataclasses.field(default_factory=list)
    untagged: bool = False
    digests: list[bytes] = dataclasses.field(default_factory=list)  # of the images and frames of a usable example
    hashes: list[ImageHash] = dataclasses.field(default_factory=list)  # of its images
    contents: Contents | None = None  # of a usable example
    shared: tuple[Shared, ...] = ()  # what a usable example gives away of held-out ones


class _Look:
    """Looks at an example as training would."""

    def __init__(
        self,
        processor: Processor | None,
        config: DataConfig,
        seed: int,
        *,
        digests: bool,
        known: Known,
        held_out: HeldOut | None,
    ):
        self.digests, self.held_out = digests, held_out
        if processor is not None and config.media_root:
            processor = processor.replace(media_roots=(config.media_root,))
        self.processor = processor
        self.config = _resolved(processor, config, seed, known) if processor else config
        # images are decoded, and not resized: nobody asks for their patches
        self.encode = Encode(processor, self.config, decode=False, known=known) if processor else None

    def at(self, read: Read, *, is_hashed: bool = False) -> Checked:
        origin, example, untagged = read
        checked = Checked(origin.file, untagged=untagged > 0)
        try:
            if isinstance(example, ExampleError):
                raise example
            parsed = parse_example(example, origin)
            checked.images = sum(1 for _ in _image_sources(parsed))
            checked.columns = unknown_columns(parsed.extra)
            checked.is_document = isinstance(parsed, Document)
            hashes: dict[str, ImageHash] = {}  # by field
            sizes: tuple[Sizes, ...] = ()
            if self.encode is None:
                self._open(parsed)
            else:
                sizes = self._encode(parsed, checked, hashes if is_hashed else None)
            if checked.rejected is None and (self.digests or self.held_out is not None):
                self._compare(parsed, checked, sizes, hashes if is_hashed else None)
        except ExampleError as error:
            checked.rejected = Rejected.of(error, "bad")
        return checked

    def _compare(
        self,
        parsed: Conversation | Document,
        checked: Checked,
        sizes: tuple[Sizes, ...],
        hashes: dict[str, ImageHash] | None,
    ) -> None:
        """Note what tells a usable example from others; ``hashes`` are known already, by field, and None wants none."""
        places = list(self._places(parsed))
        digests = [content_digest(source, **where) for _, source, where in places]
        if self.held_out is not None:
            checked.shared = self.held_out.shared(parsed, digests)
        if not self.digests:
            return
        checked.digests = digests
        if self.processor is not None:
            control = self.processor.template.facts.control.pattern
            checked.contents = contents_of(parsed, sizes, digests, control)
        if hashes is not None:
            images = [(source, where) for part, source, where in places if isinstance(part, Image)]
            checked.hashes = [
                hashes.get(where["field"]) or ImageHash.of(open_image(source, **where)) for source, where in images
            ]

    def _encode(
        self, parsed: Conversation | Document, checked: Checked, hashes: dict[str, ImageHash] | None
    ) -> tuple[Sizes, ...]:
        """Encode an example, decode its images, whose hashes are added to ``hashes``, and return their sizes."""
        read, fitted = encoded(self.encode, parsed)
        for unread in _unread_images(read):
            image = unread.open()
            if hashes is not None:
                hashes[unread.field] = ImageHash.of(image)
        checked.turns = sum(int(one.turns.max(initial=0)) for _, one in read)
        used = [one for one in fitted if isinstance(one, Example)]
        left_out = [one for one in fitted if isinstance(one, Rejected)]
        checked.rejected = next((one for one in left_out if one.kind != "part"), None)
        checked.parts = sum(one.made_to_fit == "cut" for one in used)
        checked.parts_left_out = [one for one in left_out if one.kind == "part"]
        changed = any(survey.Size.of(one).changed for one in used)
        # a conversation has the size that it was read with, which may be too long; a document those of its parts
        for one in used if used and checked.is_document else [example for _, example in read]:
            checked.sizes.append(survey.Size(one.length, one.num_patches, one.largest_image, changed))
            checked.media_tokens.append(int((one.vision_index >= 0).sum()))
            checked.loss_tokens += int((one.loss_weights > 0).sum())
        return tuple(size for _, example in read for size in example.sizes)

    def _open(self, parsed: Conversation | Document) -> None:
        """Without a processor: decode the images, and see that something has a loss."""
        if isinstance(parsed, Document):
            check_text(parsed)
        else:
            check_learnable(parsed.origin, [message.loss_weight for message in parsed.messages])
        for part, source, where in self._places(parsed):
            if isinstance(part, Video) and part.file is not None:
                shared_reader(self.config.video).read(source, Sampling(**dict(part.sampling)), **where)
            else:
                open_image(source, **where, still=self.config.animated_images == "error")

    def _places(self, parsed: Conversation | Document) -> Iterator[tuple[Image | Video, Any, dict[str, Any]]]:
        """(image or video, source, arguments that say where it is) of each image, frame and video file."""
        origin, root = parsed.origin, self.config.media_root
        for field, part, image in _image_sources(parsed):
            roots = (part.folder or str(Path(origin.file).parent), *([root] if root else []))
            yield part, image, {"origin": origin, "field": field, "roots": roots}


class Tally:
    """Counts over examples: a few numbers for each that can be encoded."""

    def __init__(self):
        self.examples = 0
        self.faults, self.parts_left_out, self.columns = Rejections(), Rejections(), {}
        self.tokens, self.media_tokens, self.images = array("q"), array("q"), array("q")
        self.patches, self.largest_images, self.turns = array("q"), array("q"), array("q")
        self.learnt = array("q")  # tokens with a loss of each example
        self.loss_tokens = self.changed = self.documents = self.cut = self.parts = self.untagged = 0

    @property
    def usable(self) -> int:
        """Examples that training would learn from."""
        return self.examples - self.faults.count()

    def add(self, checked: Checked) -> None:
        """Count an example."""
        self.examples += 1
        self.untagged += checked.untagged
        if checked.rejected is not None:
            self.faults.add(checked.rejected)
        for part in checked.parts_left_out:
            self.parts_left_out.add(part)
        if checked.columns is not None:
            self.columns.setdefault(checked.file, UnknownColumns()).counts.update(checked.columns)
            self.images.append(checked.images)
        if checked.sizes:
            self.turns.append(checked.turns)
            self.learnt.append(checked.loss_tokens)
        for size, media_tokens in zip(checked.sizes, checked.media_tokens, strict=True):
            self.tokens.append(size.length)
            self.media_tokens.append(media_tokens)
            self.patches.append(size.num_patches)
            self.largest_images.append(size.largest_image)
            self.changed += size.changed
        self.loss_tokens += checked.loss_tokens
        self.documents += checked.is_document
        self.cut += checked.parts > 0
        self.parts += checked.parts

    def column_lines(self) -> Iterator[str]:
        for file, columns in self.columns.items():
            for line in columns.lines():
                yield f"{file}: {line}"


def _suggestion(tally: Tally, look: _Look) -> str:
    if not tally.tokens or tally.parts_left_out.count():  # sizes that hold what is left would say nothing
        return ""
    measured = np.stack([tally.tokens, tally.patches, tally.largest_images], axis=1)
    spread = np.linspace(0, len(measured) - 1, min(_SAMPLE, len(measured))).astype(int)
    chosen = np.unique([*spread, *measured.argmax(0)])
    sizes = tuple(survey.Size(*map(int, values)) for values in measured[chosen])
    config = look.config
    best = dataclasses.replace(config, seq_len="auto", max_patches="auto", max_length=None)
    best = survey.choose_sizes(sizes, best, look.processor)
    return (
        f"data.seq_len {best.seq_len} and data.max_patches {best.max_patches} hold all of these examples, with "
        f"padding of about {_padding(sizes, best)}; {config.seq_len} and {config.max_patches}, which were checked, "
        f"give {_padding(sizes, config)}"
    )


def _padding(sizes: Sequence[survey.Size], config: DataConfig) -> str:
    fitting = tuple(s for s in sizes if s.length <= config.longest and s.num_patches <= config.max_patches)
    if not fitting:
        return "no packed sequence at all"
    text, patches = survey.Survey(config, len(sizes), len(sizes), fitting, ()).padding()
    return f"{100 * text:.0f} % of the tokens and {100 * patches:.0f} % of the patches"


def _resolved(processor: Processor, config: DataConfig, seed: int, known: Known) -> DataConfig:
    """Return configuration with sizes that depend on the data chosen, from the sample that training would look at."""
    on_too_long = "drop" if config.on_too_long == "error" else config.on_too_long
    looking = dataclasses.replace(config, on_bad_example="skip", on_too_long=on_too_long)
    try:
        resolved = survey.take(processor, looking, seed=seed, count=_LOOKED_AT, decode=False, known=known).config
    except UserError:  # every example of the sample is rejected, which the check itself says better
        sizes = {name: getattr(config, name) for name in ("seq_len", "max_patches")}
        return dataclasses.replace(config, **{n: getattr(DataConfig(), n) for n, v in sizes.items() if v == "auto"})
    names = ("seq_len", "max_patches", "max_image_patches")
    return dataclasses.replace(config, **{name: getattr(resolved, name) for name in names})


def _unread_images(read: Sequence[tuple[Conversation | Document, Example]]) -> Iterator[UnreadImage]:
    """Yield each image of an example that was read by its header alone, once."""
    fields = set()
    for _, example in read:
        for piece in example.patches.pieces if isinstance(example.patches, UnreadPatches) else ():
            if isinstance(piece, UnreadImage) and piece.field not in fields:
                fields.add(piece.field)
                yield piece


def _image_sources(conversation: Conversation | Document) -> Iterator[tuple[str, Image | Video, Any]]:
    """(field, image or video, source) of each image, frame and video file."""
    for image in conversation.images:
        yield f"images[{image.index}]", image, image.source
    for video in conversation.videos:
        for frame in media_sources(video):
            yield f"videos[{video.index}]", video, frame

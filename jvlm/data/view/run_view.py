"""The part of the page about the data of one run: `run_view` checks it as `jvlm data check` does."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import PIL.Image

from jvlm.data.check import check, source_of
from jvlm.data.check_report import CheckReport
from jvlm.data.config import DataConfig
from jvlm.data.encode import Encode, Known
from jvlm.data.errors import ExampleError, Origin, Rejected
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_example
from jvlm.data.few_shot import FewShotSource
from jvlm.data.mixture.examples import Examples
from jvlm.data.prepare.held_out import HeldOut
from jvlm.data.processor import Processor
from jvlm.data.sources import sources_of
from jvlm.data.view.collection import Collection, SourceView
from jvlm.data.view.drawn import Drawn, drawn, planned
from jvlm.data.view.equal_images import EqualImages, ImageLocation
from jvlm.data.view.histogram import Histogram, histogram
from jvlm.data.view.near_images import NearImages
from jvlm.data.view.sample import Sample, sample_of, thumbnail, title_of

_RECORD = 1000  # characters shown of a rejected example
_VALUE = 300  # and of one of its texts
_EQUAL = 12  # images of several examples that are shown
_HASHED = 2000  # examples of a source whose images are compared by what they show
_NEAR = 12  # pairs of those that are shown


@dataclasses.dataclass(frozen=True)
class SourceRow:
    """A line of the table of sources.

    Attributes:
      loss: share of the tokens with a loss; None without tokens.
      images: images and frames per example that can be parsed; None without any.
      share: of the run's examples; None where there is no mixture.
    """

    name: str
    examples: int
    usable: int
    rejected: int
    tokens: int
    loss: float | None
    patches: int
    images: float | None
    share: float | None


@dataclasses.dataclass(frozen=True)
class RejectedExample:
    """A rejected example: what is wrong with it, and its record as JSON, shortened."""

    origin: str
    field: str
    reason: str
    record: str


@dataclasses.dataclass(frozen=True)
class Fault:
    """Examples with one fault: how many, how many of each source, the fix, and the first of them."""

    count: int
    kind: str
    reason: str
    fix: str
    sources: dict[str, int]
    examples: tuple[RejectedExample, ...]


@dataclasses.dataclass(frozen=True)
class ShownEqualImage:
    """An image of several examples: a JPEG, how many examples of each source, and the first of them."""

    uri: str
    sources: dict[str, int]
    origins: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Equal:
    """Images of several examples: how many, how many of them in several sources, and some of them.

    They are compared by the bytes of their files, those of rejected examples not at all.
    """

    images: int
    across: int
    shown: tuple[ShownEqualImage, ...]


@dataclasses.dataclass(frozen=True)
class ShownNearPair:
    """Two images that look alike, as JPEGs, where they are, and in how many bits their hashes differ."""

    uris: tuple[str, str]
    origins: tuple[str, str]
    bits: int


@dataclasses.dataclass(frozen=True)
class Near:
    """Images that look alike in different examples: how many were compared, and the pairs that are shown."""

    images: int
    shown: tuple[ShownNearPair, ...]


@dataclasses.dataclass(frozen=True)
class ShownRemark:
    """What is worth a look in a source, and the examples that it is about, pairs joined."""

    source: str
    text: str
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RunView:
    """The data of a run, or of a stage.

    Attributes:
      total: of all sources; None if there is one.
      remarks: on usable examples, by source.
      drawn: how the run begins; None where nothing of it can be used.
      equal: images of several examples; None where demonstrations (``few_shot``) repeat them on purpose.
      near: images that look alike; None likewise.
      samples: by source.
      reports: (name, text) as `jvlm data check` prints them.
    """

    name: str
    rows: tuple[SourceRow, ...]
    total: SourceRow | None
    histograms: tuple[Histogram, ...]
    faults: tuple[Fault, ...]
    remarks: tuple[ShownRemark, ...]
    drawn: Drawn | None
    equal: Equal | None
    near: Near | None
    samples: dict[str, list[Sample]]
    reports: tuple[tuple[str, str], ...]

    def with_samples(self, most: int) -> RunView:
        """Return the view with so many samples of each source."""
        return dataclasses.replace(self, samples={name: some[:most] for name, some in self.samples.items()})


def run_view(
    name: str,
    config: DataConfig,
    processor: Processor,
    *,
    seed: int,
    samples: int,
    held_out: HeldOut | None = None,
) -> RunView:
    """Check the data of a run, and return what the page shows of it.

    Args:
      config: with files or a mixture, each source of which is checked alone.
      seed: of the run; of the samples as well.
      samples: usable examples to draw of each source, beside its extremes.
      held_out: as of `jvlm.data.check.check`.

    Raises:
      UserError, FileNotFoundError: as `jvlm.data.check.check`.
    """
    views: list[SourceView] = []
    shown: dict[str, list[Sample]] = {}
    faults: list[tuple[str, Rejected, int, list[RejectedExample]]] = []
    remarks: list[ShownRemark] = []
    reports: list[tuple[str, CheckReport]] = []
    equal, near, readers = EqualImages(), NearImages(), {}
    for label, names, own in _checks(name, config):
        examples = source_of(own, seed)
        distinct = examples.distinct() if isinstance(examples, ExampleSource) else []
        once = None if len(distinct) == len(examples) else frozenset(distinct)
        collection = Collection(names, samples, seed, distinct=once, equal=equal, near=near)
        known = Known()
        report = check(
            own.train,
            processor,
            own,
            seed=seed,
            on_rejected=lambda _: None,
            on_checked=collection.add,
            digests=own.few_shot is None,
            hashed=_HASHED if own.few_shot is None else 0,
            known=known,
            held_out=held_out,
        )
        reports.append((label, report))
        opened = processor.replace(media_roots=(own.media_root,)) if own.media_root else processor
        encode = Encode(opened, report.config, decode=False, known=known)
        readers |= dict.fromkeys(collection.sources, (opened, examples))
        for view in collection.sources.values():
            views.append(view)
            remarks += _remarks(view, examples)
            chosen = view.chosen().items()
            shown[view.name] = [sample_of(encode, examples.read(index), why) for index, why in chosen]
            for key, group in view.tally.faults.groups.items():
                first = [_rejected(examples.read(i).record, error) for i, error in view.rejected.get(key, [])]
                faults.append((view.name, group.first, group.count, first))
    run = planned(processor, config, [report.config for _, report in reports])
    assumed = run.run_examples if config.run_examples is None else None
    shared = known if config.mixture is None else None  # sources are read with settings of their own
    shares = _shares(run)
    rows = [_row(view, shares.get(view.name, 0.0) if config.mixture is not None else None) for view in views]
    return RunView(
        name=name,
        rows=tuple(rows),
        total=_total(rows, views) if len(rows) > 1 else None,
        histograms=_histograms(views, [report.config for _, report in reports]),
        faults=tuple(_grouped(faults)),
        remarks=tuple(remarks),
        drawn=_drawn(run, processor, seed, assumed, shared) if _usable(views) else None,
        equal=_equal(equal, readers) if config.few_shot is None else None,
        near=_near(near, readers) if config.few_shot is None else None,
        samples=shown,
        reports=tuple((label, report.text()) for label, report in reports),
    )


def _remarks(view: SourceView, examples: ExampleSource | FewShotSource) -> Iterator[ShownRemark]:
    for remark in view.remarks.found():
        groups = (" and ".join(title_of(examples.read(i).origin) for i in group) for group in remark.examples)
        yield ShownRemark(view.name, remark.text, tuple(groups))


def _usable(views: Sequence[SourceView]) -> bool:
    """Whether training would find something to learn from in each source."""
    return all(view.tally.usable for view in views)


def _drawn(config: DataConfig, processor: Processor, seed: int, assumed: int | None, known: Known | None) -> Drawn:
    on_too_long = "drop" if config.on_too_long == "error" else config.on_too_long
    config = dataclasses.replace(config, on_bad_example="skip", on_too_long=on_too_long, worker_processes=0)
    if config.media_root:
        processor = processor.replace(media_roots=(config.media_root,))
    return drawn(processor, config, seed=seed, assumed=assumed, known=known)


def _checks(name: str, config: DataConfig) -> Iterator[tuple[str, dict[str, str], DataConfig]]:
    """(name, source of each file, configuration) of each check: one, or one for each source of a mixture."""
    from jvlm.data.mixture.examples import config_of
    from jvlm.data.mixture.plan import enters

    if config.mixture is None:
        files = sources_of(config.train)
        yield name, {path: source for source, paths in files.items() for path in paths}, config
        return
    for path, source in enters(config.mixture).items():
        own = config_of(config, source)
        files = sources_of(own.train)
        yield f"{name}, {path}", {file: path for paths in files.values() for file in paths}, own


def _shares(config: DataConfig) -> dict[str, float]:
    """Return the share of the run's examples of each source of a mixture."""
    if config.mixture is None:
        return {}
    return {name: float(share) for name, share in Examples.open(config).shares(config).of.items()}


def _row(view: SourceView, share: float | None) -> SourceRow:
    tally, tokens = view.tally, sum(view.tally.tokens)
    return SourceRow(
        name=view.name,
        examples=tally.examples,
        usable=tally.usable,
        rejected=tally.faults.count(),
        tokens=tokens,
        loss=tally.loss_tokens / tokens if tokens else None,
        patches=sum(tally.patches),
        images=sum(tally.images) / len(tally.images) if tally.images else None,
        share=share,
    )


def _total(rows: Sequence[SourceRow], views: Sequence[SourceView]) -> SourceRow:
    sums = {name: sum(getattr(row, name) for row in rows) for name in "examples usable rejected tokens patches".split()}
    images, parsed = sum(sum(view.tally.images) for view in views), sum(len(view.tally.images) for view in views)
    loss = sum(view.tally.loss_tokens for view in views)
    return SourceRow(
        name="all",
        loss=loss / sums["tokens"] if sums["tokens"] else None,
        images=images / parsed if parsed else None,
        share=None if rows[0].share is None else sum(row.share or 0.0 for row in rows),
        **sums,
    )


def _histograms(views: Sequence[SourceView], configs: Sequence[DataConfig]) -> tuple[Histogram, ...]:
    limits = {
        "tokens": {"seq_len": [config.seq_len for config in configs]},
        "patches": {"max_patches": [config.max_patches for config in configs]},
        "largest_images": {"max_image_patches": [one.max_image_patches for one in configs if one.max_image_patches]},
        "images": {},
        "turns": {},
        "learnt": {},
    }
    longest = [config.longest for config in configs if config.longest < config.seq_len]
    limits["tokens"] |= {"max_length": longest} if longest else {}
    titles = {
        "tokens": "Tokens of an example",
        "patches": "Patches of an example",
        "largest_images": "Largest image of an example, in patches",
        "images": "Images and frames of an example",
        "turns": "Assistant turns of an example",
        "learnt": "Loss tokens of an example",
    }
    return tuple(
        histogram(title, {view.name: getattr(view.tally, key) for view in views}, limits[key])
        for key, title in titles.items()
    )


def _grouped(faults: Sequence[tuple[str, Rejected, int, list[RejectedExample]]]) -> Iterator[Fault]:
    """Yield the faults of all sources, the most frequent first."""

    def key(one: tuple[str, Rejected, int, list[RejectedExample]]) -> tuple[str, ...]:
        return one[1].fault

    groups = [list(group) for _, group in itertools.groupby(sorted(faults, key=key), key)]
    for group in sorted(groups, key=lambda group: -sum(count for _, _, count, _ in group)):
        first = group[0][1]
        yield Fault(
            count=sum(count for _, _, count, _ in group),
            kind=first.kind.replace("_", " "),
            reason=f"field {first.field!r}: {first.reason}",
            fix=first.fix,
            sources={source: count for source, _, count, _ in group},
            examples=tuple(example for *_, examples in group for example in examples),
        )


def _equal(found: EqualImages, readers: Mapping[str, tuple[Processor, ExampleSource | FewShotSource]]) -> Equal:
    images, shown = found.images(), []
    for image in images[:_EQUAL]:
        read = [readers[location.source][1].read(location.index) for location in image.first]
        processor, _ = readers[image.first[0].source]
        parsed = parse_example(read[0].record, read[0].origin)
        opened = processor.with_open_media(parsed)
        # as `jvlm.data.check` numbers them: images before frames of videos, of which a file counts as one
        frames = [one.source for one in opened.images]
        for one, video in zip(parsed.videos, opened.videos, strict=True):
            frames += video.frames if one.file is None else video.frames[:1]
        uri = thumbnail(frames[image.first[0].number])
        shown.append(ShownEqualImage(uri, dict(image.examples), tuple(title_of(one.origin) for one in read)))
    return Equal(len(images), sum(len(image.examples) > 1 for image in images), tuple(shown))


def _near(found: NearImages, readers: Mapping[str, tuple[Processor, ExampleSource | FewShotSource]]) -> Near:
    def read(location: ImageLocation) -> tuple[PIL.Image.Image, Origin]:
        processor, source = readers[location.source]
        one = source.read(location.index)
        parsed = processor.with_open_media(parse_example(one.record, one.origin))
        return parsed.images[location.number].source, one.origin

    shown = []
    for pair in found.pairs(lambda location: read(location)[0], _NEAR):
        (first, a), (second, b) = read(pair.first), read(pair.second)
        shown.append(ShownNearPair((thumbnail(first), thumbnail(second)), (title_of(a), title_of(b)), pair.bits))
    return Near(len(found), tuple(shown))


def _rejected(record: Any, error: Rejected) -> RejectedExample:
    text = "" if isinstance(record, ExampleError) else json.dumps(_short(record), ensure_ascii=False, default=str)
    text = text if len(text) <= _RECORD else f"{text[:_RECORD]}..."
    return RejectedExample(title_of(Origin(error.file, error.number)), error.field, error.reason, text)


def _short(value: Any) -> Any:
    """Return a record without long texts and bytes."""
    if isinstance(value, dict):
        return {str(key): _short(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_short(inner) for inner in value]
    if isinstance(value, bytes):
        return f"({len(value):,} bytes)"
    if isinstance(value, str) and len(value) > _VALUE:
        return f"{value[:_VALUE]}... ({len(value):,} characters)"
    return value

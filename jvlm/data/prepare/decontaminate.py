"""Examples of evaluation sets in training data, by their words and their images.

A text is contaminated if it shares a run of 13 words with a question or an answer of an evaluation set (the rule of
GPT-3, arXiv 2005.14165, appendix C); an image, if it is near an image of one and a second look agrees. Crops and mirror
images are not found by this.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jvlm.data.conversion import source_identity
from jvlm.data.engines.engine import Engine, InProcess
from jvlm.data.errors import ExampleError, Rejected
from jvlm.data.example_source import ExampleSource
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.prepare import hamming
from jvlm.data.prepare.facts import Examples, texts_of
from jvlm.data.prepare.image_hash import MAX_DISTANCE, HashBits, second_look
from jvlm.data.prepare.keeping import WORK, Found, Kept, keep, prepared_folder
from jvlm.data.prepare.ngrams import NGRAM_WORDS, NgramIndex
from jvlm.data.prepare.pieces import Pieces
from jvlm.errors import UserError
from jvlm.progress import Progress

Kind = Literal["text", "image"]
KINDS: tuple[Kind, ...] = ("text", "image")


@dataclasses.dataclass(frozen=True)
class Contamination:
    """What counts as contaminated.

    Attributes:
      ngram_words: words of a run that a text shares with a question or an answer of an evaluation set.
      least_words: shorter questions and answers are not looked for; they are counted.
      most_items: a run of words of more items of an evaluation set than this is a phrase, and is not looked for.
      hash_bits, max_distance: as of `jvlm.data.prepare.dedup.Likeness`.
    """

    ngram_words: int = NGRAM_WORDS
    least_words: int = 8
    most_items: int = 10
    hash_bits: HashBits = 256
    max_distance: int = MAX_DISTANCE[256]

    def __post_init__(self):
        if not 1 <= self.least_words <= self.ngram_words:
            raise UserError(f"least_words is {self.least_words}; it must be from 1 to ngram_words, {self.ngram_words}")


class EvaluationSet:
    """An evaluation set to look for.

    Args:
      name: for the report.
      files: of its examples, in any format that is read.
      read: counts an example that was read.

    Raises:
      ExampleError: an example that cannot be used.
    """

    def __init__(
        self, name: str, files: Sequence[str], rule: Contamination, options: FormatOptions, media_root: str | None
    ):
        self.name, self.rule = name, rule
        self.examples = Examples(ExampleSource(files, options), media_root)
        self.index = NgramIndex(rule.ngram_words, least_words=rule.least_words, most_items=rule.most_items)
        hashes, owners = [], []
        with Progress(total=len(self.source), desc=f"reading {name}", unit="example") as bar:
            for item in range(len(self.source)):
                for text in texts_of(self.examples.parsed(item)):
                    if text.strip():
                        self.index.add(item, text)
                for number, found in enumerate(self.examples.facts(item, rule.hash_bits).images):
                    hashes.append(np.frombuffer(found, ">u8").astype(np.uint64))
                    owners.append((item, number))
                bar.update(1)
        self.hashes = np.stack(hashes) if hashes else np.zeros((0, rule.hash_bits // 64), np.uint64)
        self.owners = owners

    @property
    def source(self) -> ExampleSource:
        """Its examples as they are read."""
        return self.examples.source

    def identity(self) -> str:
        """Return what tells the set from others."""
        return f"{self.name} {source_identity(self.source)}"


def decontaminate(
    files: Sequence[str],
    output: str | Path,
    evaluation: Mapping[str, Sequence[str]],
    *,
    drop: Sequence[Kind] = (),
    rule: Contamination = Contamination(),
    options: FormatOptions = FormatOptions(),
    media_root: str | None = None,
    on_bad_example: Literal["error", "skip"] = "error",
    examples_per_shard: int = 10_000,
    threads: int = 4,
    engine: Engine = InProcess(),
) -> Kept:
    """Find examples of evaluation sets in training data, list them in ``found.jsonl`` of a folder, and with ``drop``
    write the other examples as shards.

    An example that shares both counts as "text". ``report.json`` has, for each evaluation set, how many of its items
    were found in the data, by text and by image, and how many training examples found them.

    Args:
      evaluation: name -> files of each evaluation set.
      drop: kinds that are left out; empty only looks.
      engine: what searches, and writes shards.

    Raises:
      ExampleError: an example that cannot be used, unless skipped; one of an evaluation set, always.
      UserError: wrong arguments, files that cannot be read, a folder that cannot be written or holds shards.
    """
    unknown = [kind for kind in drop if kind not in KINDS]
    if unknown:
        raise UserError(f"nothing is contaminated by {unknown[0]!r}; there are {', '.join(KINDS)}")
    if not evaluation:
        raise UserError("no evaluation set to look for")
    output = prepared_folder(output)
    source = ExampleSource(files, options)
    examples = Examples(source, media_root)
    sets = [EvaluationSet(name, some, rule, options, media_root) for name, some in evaluation.items()]
    settings = (source_identity(source), [one.identity() for one in sets], rule, media_root, on_bad_example)
    identity = hashlib.sha256(repr(settings).encode()).hexdigest()
    bad: dict[int, Rejected] = {}
    # name -> kind -> items found, and training examples that found one
    items: dict[str, dict[Kind, set[int]]] = {one.name: defaultdict(set) for one in sets}
    hits: dict[str, dict[Kind, set[int]]] = {one.name: defaultdict(set) for one in sets}

    def found() -> Iterator[Found]:
        task = _Search(examples, sets, rule, on_bad_example == "skip", threads)
        for index, shared, rejected in _searched(task, output, identity, engine):
            if rejected is not None:
                bad[index] = rejected
            for name, kind, item, _ in shared:
                items[name][kind].add(item)
                hits[name][kind].add(index)
            if shared:
                kinds = {kind for _, kind, _, _ in shared}
                by_set = {one.name: one.source for one in sets}
                listed = [
                    {"evaluation": name, "by": kind, "item": by_set[name].read(item).origin.number, **detail}
                    for name, kind, item, detail in shared
                ]
                yield Found(index, "text" if "text" in kinds else "image", {"shares": listed})

    everything = list(found())
    counts = {
        one.name: {
            "items": len(one.source),
            "too_short_texts": one.index.too_short,
            "common_ngrams": one.index.common,
            **{f"items_by_{kind}": len(items[one.name][kind]) for kind in KINDS},
            **{f"examples_by_{kind}": len(hits[one.name][kind]) for kind in KINDS},
        }
        for one in sets
    }
    return keep(
        source,
        everything,
        output,
        identity=identity,
        drop=tuple(drop),
        bad=bad,
        examples_per_shard=examples_per_shard,
        media_root=media_root,
        notes=tuple(_line(name, count) for name, count in counts.items()),
        more={"evaluation": counts},
        engine=engine,
    )


def _line(name: str, count: Mapping[str, int]) -> str:
    return (
        f"{name}: of {count['items']:,} items {count['items_by_text']:,} share text with {count['examples_by_text']:,} "
        f"examples, {count['items_by_image']:,} an image with {count['examples_by_image']:,}; "
        f"{count['too_short_texts']:,} texts were too short to look for, {count['common_ngrams']:,} runs too common"
    )


Shared = tuple[str, Kind, int, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Search:
    """(what it shares, why it cannot be used) of examples: a `jvlm.data.engines.engine.Task`."""

    examples: Examples
    sets: Sequence[EvaluationSet]
    rule: Contamination
    skip: bool
    threads: int

    def __call__(self, some: range) -> list[Any]:
        with ThreadPoolExecutor(self.threads) as pool:
            read = list(pool.map(self._read, some))
        shared: list[list[Shared]] = [[] for _ in some]
        for one in self.sets:
            for row, (texts, _, _) in enumerate(read):
                shared[row] += [(one.name, "text", o.item, {"text": o.text}) for o in _overlaps(one, texts)]
            _images(self.examples, one, some, [images for _, images, _ in read], self.rule, shared)
        return [
            [list(map(list, row)), None if rejected is None else dataclasses.asdict(rejected)]
            for row, (_, _, rejected) in zip(shared, read, strict=True)
        ]

    def _read(self, index: int) -> tuple[list[str], tuple[bytes, ...], Rejected | None]:
        try:
            return texts_of(self.examples.parsed(index)), self.examples.facts(index, self.rule.hash_bits).images, None
        except ExampleError as error:
            if not self.skip:
                raise
            return [], (), Rejected.of(error, "bad")


def _searched(
    task: _Search, output: Path, identity: str, engine: Engine
) -> Iterator[tuple[int, list[Shared], Rejected | None]]:
    """(index, what it shares, why it cannot be used) of every example."""
    count, index = len(task.examples), 0
    with Progress(total=count, desc="searching", unit="example") as bar:
        for values in Pieces(output / WORK, "shared", identity, count).run(task, engine):
            for shared, rejected in values:
                yield index, [tuple(one) for one in shared], None if rejected is None else Rejected(**rejected)
                index += 1
            bar.update(len(values))


def _overlaps(one: EvaluationSet, texts: Sequence[str]):
    found = {}
    for text in texts:
        for overlap in one.index.find(text):
            found.setdefault(overlap.item, overlap)
    return [found[item] for item in sorted(found)]


def _images(
    examples: Examples,
    one: EvaluationSet,
    some: range,
    images: Sequence[tuple[bytes, ...]],
    rule: Contamination,
    shared: list[list[Shared]],
) -> None:
    """Add the items whose images are near those of a piece of examples."""
    places = [(row, number) for row, hashes in enumerate(images) for number in range(len(hashes))]
    if not places or not len(one.hashes):
        return
    queries = np.stack([np.frombuffer(images[row][number], ">u8") for row, number in places]).astype(np.uint64)
    near = sorted(
        (int(q), int(s), int(bits))
        for arrays in hamming.near(queries, one.hashes, rule.max_distance)
        for q, s, bits in zip(*arrays, strict=True)
    )
    seen = set()
    for q, s, bits in near:
        (row, number), (item, item_number) = places[q], one.owners[s]
        if (row, item) in seen:
            continue
        look = second_look(examples.thumbnails(some[row])[number], one.examples.thumbnails(item)[item_number])
        if look.same:
            seen.add((row, item))
            detail = {"image": number, "bits": bits, "correlation": round(look.correlation, 3)}
            shared[row].append((one.name, "image", item, detail))

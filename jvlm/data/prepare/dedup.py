"""Duplicates within a set of examples, and of one set in another.

Three passes: facts of each example (streamed, kept on disk), candidates (from arrays in memory: some 400 bytes of a
text, some 150 of an image), and a comparison of the candidates themselves. An example is a duplicate if an *earlier*
one is like it, dropped or not: the rule needs no order of work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt64

from jvlm.data.conversion import source_identity
from jvlm.data.engines.engine import Engine, InProcess
from jvlm.data.errors import ExampleError, Rejected
from jvlm.data.example_source import ExampleSource
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.prepare.candidates import Pairs, near_hashes, shared_keys
from jvlm.data.prepare.facts import Examples, Facts, text_of
from jvlm.data.prepare.image_hash import MAX_DISTANCE, HashBits, second_look
from jvlm.data.prepare.keeping import WORK, Found, Kept, keep, prepared_folder
from jvlm.data.prepare.ngrams import KEYS, jaccard, shingles
from jvlm.data.prepare.pieces import Pieces
from jvlm.errors import UserError
from jvlm.progress import Progress

Kind = Literal["equal", "near", "near_text", "near_images"]
KINDS: tuple[Kind, ...] = ("equal", "near", "near_text", "near_images")
_BLOCK = 4096  # examples whose facts become arrays together


@dataclasses.dataclass(frozen=True)
class Likeness:
    """When examples are duplicates.

    Attributes:
      hash_bits: of the perceptual hash of images.
      max_distance: most bits in which the hashes of near images differ.
      least_jaccard: least share of runs of five words that near texts have in common.
      most_compared: most earlier examples that one is compared with; pairs beyond are counted.
    """

    hash_bits: HashBits = 256
    max_distance: int = MAX_DISTANCE[256]
    least_jaccard: float = 0.8
    most_compared: int = 64

    def __post_init__(self):
        if not 0 <= self.max_distance <= self.hash_bits // 4:
            raise UserError(f"max_distance is {self.max_distance}; it must be from 0 to {self.hash_bits // 4}")
        if not 0 < self.least_jaccard <= 1:
            raise UserError(f"least_jaccard is {self.least_jaccard}; it must be above 0 and at most 1")


def dedup(
    files: Sequence[str],
    output: str | Path,
    *,
    against: Sequence[str] = (),
    drop: Sequence[Kind] = (),
    likeness: Likeness = Likeness(),
    options: FormatOptions = FormatOptions(),
    media_root: str | None = None,
    on_bad_example: Literal["error", "skip"] = "error",
    examples_per_shard: int = 10_000,
    threads: int = 4,
    engine: Engine = InProcess(),
) -> Kept:
    """Find duplicates, list them in ``found.jsonl`` of a folder, and with ``drop`` write the other examples as shards.

    Kinds: "equal" examples say and show the same; "near" ones have the same words and near images; "near_text" ones
    have no images and nearly the same words; "near_images" ones have near images and other words. Images are near if
    their hashes are and a second look at the images themselves agrees, for all of an example's images in order.

    Args:
      against: files whose examples come before all others: duplicates of them are found, they are not written.
      drop: kinds that are left out; empty only looks. The same folder then goes on with what was measured.
      engine: what measures, compares, and writes shards. Candidates are found in this process.

    Raises:
      ExampleError: an example that cannot be used, unless skipped.
      UserError: wrong arguments, files that cannot be read, a folder that cannot be written or holds shards.
    """
    unknown = [kind for kind in drop if kind not in KINDS]
    if unknown:
        raise UserError(f"no duplicates are of kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    output = prepared_folder(output)
    source = ExampleSource([*against, *files], options)
    first = sum(ExampleSource([pattern], options).__len__() for pattern in against)
    examples = Examples(source, media_root)
    identity = hashlib.sha256(repr((source_identity(source), media_root, likeness, first)).encode()).hexdigest()
    task = _Measure(examples, likeness.hash_bits, on_bad_example == "skip", threads)
    table, bad = _measured(task, output, identity, engine)
    pairs = table.candidates(first, likeness)
    found = [
        Found(int(j), "equal", _of(source, int(table.equal_of[j])))
        for j in np.flatnonzero(table.equal_of < np.arange(len(source)))
        if j >= first
    ]
    found += _compared(_Compare(examples, table, list(pairs.by_later()), likeness), output, identity, engine)
    found.sort(key=lambda one: one.index)
    bad = {index: one for index, one in bad.items() if index >= first}
    notes = [f"{pairs.cut:,} more pairs of candidates were not compared (most_compared)"] if pairs.cut else []
    return keep(
        source,
        found,
        output,
        identity=identity,
        drop=tuple(drop),
        bad=bad,
        first=first,
        examples_per_shard=examples_per_shard,
        media_root=media_root,
        notes=tuple(notes),
        more={"not_compared": pairs.cut},
        engine=engine,
    )


def _of(source: ExampleSource, index: int) -> dict[str, Any]:
    origin = source.read(index).origin
    return {"of_file": origin.file, "of_number": origin.number}


@dataclasses.dataclass(frozen=True)
class _Measure:
    """(facts, why it cannot be used) of examples: a `jvlm.data.engines.engine.Task`."""

    examples: Examples
    bits: HashBits
    skip: bool
    threads: int

    def __call__(self, some: range) -> list[Any]:
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._one, some))

    def _one(self, index: int) -> list[Any]:
        try:
            return [dataclasses.astuple(self.examples.facts(index, self.bits)), None]
        except ExampleError as error:
            if not self.skip:
                raise
            return [None, dataclasses.asdict(Rejected.of(error, "bad"))]


def _measured(task: _Measure, output: Path, identity: str, engine: Engine) -> tuple[Table, dict[int, Rejected]]:
    """Return the facts of all examples, and those that cannot be used."""
    count, bad, index = len(task.examples), {}, 0
    pieces = Pieces(output / WORK, "facts", f"{identity} {task.skip}", count)

    def facts() -> Iterator[Facts | None]:
        nonlocal index
        for values in pieces.run(task, engine):
            for found, rejected in values:
                if rejected is not None:
                    bad[index] = Rejected(**rejected)
                index += 1
                yield None if found is None else Facts(*found)
            bar.update(len(values))

    with Progress(total=count, desc="hashing", unit="example") as bar:
        return Table.of(facts(), task.bits), bad


@dataclasses.dataclass(frozen=True)
class Table:
    """The facts of n examples as arrays.

    Attributes:
      equal_of: the first example with the same content; itself for most.
      text_of: the first example with the same normalized text; -1 for one that cannot be used.
      hashes: of all images, in the order of the examples.
      starts: the first hash of each example, and the number of hashes.
      keys: of the texts that have some.
      keyed: examples that these are of, ascending.
    """

    equal_of: Int[np.ndarray, " n"]
    text_of: Int[np.ndarray, " n"]
    hashes: UInt64[np.ndarray, "m w"]
    starts: Int[np.ndarray, " n+1"]
    keys: UInt64[np.ndarray, "k bands"]
    keyed: Int[np.ndarray, " k"]

    @classmethod
    def of(cls, measured: Iterable[Facts | None], bits: HashBits) -> Table:
        """Return the table; an example that cannot be used is like no other."""
        blocks = []
        measured = iter(measured)
        while some := list(itertools.islice(measured, _BLOCK)):
            keyed = [i for i, one in enumerate(some) if one is not None and one.keys]
            blocks.append(
                (
                    _digests([None if one is None else one.equal for one in some]),
                    _digests([None if one is None else one.text for one in some]),
                    _words([image for one in some if one is not None for image in one.images], bits // 64),
                    np.array([0 if one is None else len(one.images) for one in some], np.int32),
                    _words([some[i].keys for i in keyed], KEYS),
                    np.array(keyed, np.int64) + _BLOCK * len(blocks),
                )
            )
        equal, text, hashes, images, keys, keyed = (np.concatenate(one) for one in zip(*blocks, strict=True))
        starts = np.concatenate([[0], np.cumsum(images)])
        return cls(_firsts(equal), np.where(_usable(text), _firsts(text), -1), hashes, starts, keys, keyed)

    def images(self, example: int) -> UInt64[np.ndarray, "i w"]:
        """Return the hashes of an example's images."""
        return self.hashes[self.starts[example] : self.starts[example + 1]]

    def candidates(self, first: int, likeness: Likeness) -> Pairs:
        """Return the pairs to compare: near hashes of their first images, or a key in common."""
        pairs = Pairs(likeness.most_compared)
        distinct = self.equal_of == np.arange(len(self.equal_of))
        counts = np.diff(self.starts)
        # examples are compared with those of as many images alone
        for count in np.unique(counts[counts > 0]):
            some = np.flatnonzero(distinct & (counts == count))
            near_hashes(some, self.hashes[self.starts[some]], likeness.max_distance, first, pairs)
        some = distinct[self.keyed]
        if some.any():
            shared_keys(self.keyed[some], self.keys[some], first, pairs)
        return pairs


def _digests(found: Sequence[bytes | None]) -> np.ndarray:
    """Return digests as pairs of numbers; zeros where there is none."""
    return np.frombuffer(b"".join(one or bytes(16) for one in found), np.uint64).reshape(-1, 2)


def _words(found: Sequence[bytes], count: int) -> np.ndarray:
    return np.frombuffer(b"".join(found), ">u8").reshape(-1, count).astype(np.uint64)


def _usable(digests: np.ndarray) -> np.ndarray:
    return digests.any(axis=1)


def _firsts(digests: np.ndarray) -> np.ndarray:
    """Return the first example with each one's digest; of those without one, itself."""
    order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    begins = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    firsts = np.empty(len(digests), np.int64)
    firsts[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    return np.where(_usable(digests), firsts, np.arange(len(digests)))


@dataclasses.dataclass(frozen=True)
class _Compare:
    """What later examples are duplicates of, by comparing the examples: a `jvlm.data.engines.engine.Task`."""

    examples: Examples
    table: Table
    asked: Sequence[tuple[int, list[int]]]
    likeness: Likeness

    def __call__(self, some: range) -> list[Any]:
        return [self._one(*self.asked[number]) for number in some]

    def _one(self, later: int, earlier: Sequence[int]) -> list[Any] | None:
        best: tuple[int, int, dict[str, Any]] | None = None
        for index in earlier:
            found = compared(self.examples, self.table, later, index, self.likeness)
            if found is not None and (best is None or KINDS.index(found[0]) < best[0]):
                best = (KINDS.index(found[0]), index, found[1])
            if best is not None and best[0] <= KINDS.index("near_text") and best[1] == index:
                break
        return None if best is None else list(best)


def _compared(task: _Compare, output: Path, identity: str, engine: Engine) -> Iterator[Found]:
    """Yield what each later example is a duplicate of."""
    pieces, at = Pieces(output / WORK, "compared", identity, len(task.asked), 32), 0
    with Progress(total=len(task.asked), desc="comparing", unit="example") as bar:
        for values in pieces.run(task, engine):
            for value in values:
                if value is not None:
                    kind, index, detail = value
                    yield Found(task.asked[at][0], KINDS[kind], {**_of(task.examples.source, index), **detail})
                at += 1
            bar.update(len(values))


def compared(
    examples: Examples, table: Table, later: int, earlier: int, likeness: Likeness
) -> tuple[Kind, dict[str, Any]] | None:
    """Return which kind of duplicates two examples are, and how near; None if they are none."""
    a, b = table.images(later), table.images(earlier)
    if len(a) != len(b):
        return None
    if not len(a):
        share = jaccard(shingles(text_of(examples.parsed(later))), shingles(text_of(examples.parsed(earlier))))
        return ("near_text", {"jaccard": round(share, 4)}) if share >= likeness.least_jaccard else None
    bits = np.bitwise_count(a ^ b).sum(axis=1).tolist()
    if max(bits) > likeness.max_distance:
        return None
    looks = [second_look(*two) for two in zip(examples.thumbnails(later), examples.thumbnails(earlier), strict=True)]
    if not all(look.same for look in looks):
        return None
    kind: Kind = "near" if table.text_of[later] == table.text_of[earlier] else "near_images"
    return kind, {"bits": bits, "correlation": round(min(look.correlation for look in looks), 3)}

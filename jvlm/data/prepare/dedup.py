"""Duplicates within a set of examples, and of one set in another.

Three passes: facts of each example (streamed, kept on disk), candidates (in memory, about half a kilobyte an example),
and a comparison of the candidates themselves. An example is a duplicate if an *earlier* one is like
it, dropped or not: the rule needs no order of work.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jvlm.data.conversion import source_identity
from jvlm.data.errors import ExampleError, Rejected
from jvlm.data.example_source import ExampleSource
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.prepare.candidates import Pairs, near_hashes, shared_keys
from jvlm.data.prepare.facts import Examples, Facts, text_of
from jvlm.data.prepare.image_hash import MAX_DISTANCE, HashBits, second_look
from jvlm.data.prepare.keeping import WORK, Found, Kept, keep, prepared_folder
from jvlm.data.prepare.ngrams import jaccard, shingles
from jvlm.data.prepare.pieces import Pieces
from jvlm.errors import UserError
from jvlm.progress import Progress

Kind = Literal["equal", "near", "near_text", "near_images"]
KINDS: tuple[Kind, ...] = ("equal", "near", "near_text", "near_images")


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
) -> Kept:
    """Find duplicates, list them in ``found.jsonl`` of a folder, and with ``drop`` write the other examples as shards.

    Kinds: "equal" examples say and show the same; "near" ones have the same words and near images; "near_text" ones
    have no images and nearly the same words; "near_images" ones have near images and other words. Images are near if
    their hashes are and a second look at the images themselves agrees, for all of an example's images in order.

    Args:
      against: files whose examples come before all others: duplicates of them are found, they are not written.
      drop: kinds that are left out; empty only looks. The same folder then goes on with what was measured.

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
    measured, bad = _measure(examples, output, identity, likeness, on_bad_example == "skip", threads)
    table = Table.of(measured, likeness.hash_bits)
    pairs = table.candidates(first, likeness)
    found = [
        Found(int(j), "equal", _of(source, int(table.equal_of[j])))
        for j in np.flatnonzero(table.equal_of < np.arange(len(source)))
        if j >= first
    ]
    found += _compare(examples, table, pairs, output, identity, likeness)
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
    )


def _of(source: ExampleSource, index: int) -> dict[str, Any]:
    origin = source.read(index).origin
    return {"of_file": origin.file, "of_number": origin.number}


def _measure(
    examples: Examples, output: Path, identity: str, likeness: Likeness, skip: bool, threads: int
) -> tuple[list[Facts | None], dict[int, Rejected]]:
    """Return the facts of every example, None for one that cannot be used."""

    def one(index: int) -> list[Any]:
        try:
            return [dataclasses.astuple(examples.facts(index, likeness.hash_bits)), None]
        except ExampleError as error:
            if not skip:
                raise
            return [None, dataclasses.asdict(Rejected.of(error, "bad"))]

    measured: list[Facts | None] = []
    bad: dict[int, Rejected] = {}
    pieces = Pieces(output / WORK, "facts", f"{identity} {skip}", len(examples))
    with ThreadPoolExecutor(threads) as pool, Progress(total=len(examples), desc="hashing", unit="example") as bar:
        for values in pieces.run(lambda some: list(pool.map(one, some))):
            for found, rejected in values:
                if rejected is not None:
                    bad[len(measured)] = Rejected(**rejected)
                measured.append(None if found is None else Facts(*found))
            bar.update(len(values))
    return measured, bad


@dataclasses.dataclass(frozen=True)
class Table:
    """The facts of all examples as arrays.

    Attributes:
      equal_of: the first example with the same content; itself for most.
      text: a number for each normalized text.
      hashes: of each image of each example.
      keys: example -> keys of its text.
    """

    equal_of: np.ndarray
    text: np.ndarray
    hashes: list[np.ndarray]
    keys: list[np.ndarray]

    @classmethod
    def of(cls, measured: Sequence[Facts | None], bits: int) -> Table:
        """Return the table; an example that cannot be used is like no other."""
        seen: dict[bytes, int] = {}
        texts: dict[bytes, int] = {}
        equal_of = np.arange(len(measured))
        text = np.full(len(measured), -1)
        hashes, keys = [], []
        for index, one in enumerate(measured):
            if one is not None:
                equal_of[index] = seen.setdefault(one.equal, index)
                text[index] = texts.setdefault(one.text, index)
            hashes.append(np.frombuffer(b"".join(one.images) if one else b"", ">u8").reshape(-1, bits // 64))
            keys.append(np.frombuffer(one.keys if one else b"", ">u8"))
        return cls(equal_of, text, hashes, keys)

    def candidates(self, first: int, likeness: Likeness) -> Pairs:
        """Return the pairs to compare: near hashes of their first images, or a key in common."""
        pairs = Pairs(likeness.most_compared)
        distinct = self.equal_of == np.arange(len(self.equal_of))
        counts = np.array([len(one) for one in self.hashes])
        # examples are compared with those of as many images alone
        for count in np.unique(counts[counts > 0]):
            some = np.flatnonzero(distinct & (counts == count))
            stacked = np.stack([self.hashes[index][0] for index in some]).astype(np.uint64)
            near_hashes(some, stacked, likeness.max_distance, first, pairs)
        some = np.array([index for index in np.flatnonzero(distinct) if len(self.keys[index])], np.int64)
        if len(some):
            shared_keys(some, np.stack([self.keys[index] for index in some]).astype(np.uint64), first, pairs)
        return pairs


def _compare(
    examples: Examples, table: Table, pairs: Pairs, output: Path, identity: str, likeness: Likeness
) -> Iterator[Found]:
    """Yield what each later example is a duplicate of, by comparing the examples themselves."""
    asked = list(pairs.by_later())

    def one(number: int) -> list[Any] | None:
        later, earlier = asked[number]
        best: tuple[int, int, dict[str, Any]] | None = None
        for index in earlier:
            found = compared(examples, table, later, index, likeness)
            if found is not None and (best is None or KINDS.index(found[0]) < best[0]):
                best = (KINDS.index(found[0]), index, found[1])
            if best is not None and best[0] <= KINDS.index("near_text") and best[1] == index:
                break
        return None if best is None else list(best)

    pieces = Pieces(output / WORK, "compared", identity, len(asked), 32)
    at = 0
    with Progress(total=len(asked), desc="comparing", unit="example") as bar:
        for values in pieces.run(lambda some: [one(number) for number in some]):
            for value in values:
                if value is not None:
                    kind, index, detail = value
                    yield Found(asked[at][0], KINDS[kind], {**_of(examples.source, index), **detail})
                at += 1
            bar.update(len(values))


def compared(
    examples: Examples, table: Table, later: int, earlier: int, likeness: Likeness
) -> tuple[Kind, dict[str, Any]] | None:
    """Return which kind of duplicates two examples are, and how near; None if they are none."""
    a, b = table.hashes[later], table.hashes[earlier]
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
    kind: Kind = "near" if table.text[later] == table.text[earlier] else "near_images"
    return kind, {"bits": bits, "correlation": round(min(look.correlation for look in looks), 3)}

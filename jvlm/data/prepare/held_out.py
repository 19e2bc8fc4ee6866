"""What evaluation and validation data share with training data, counted while the training data is read for a check.

Words are looked for as `jvlm data decontaminate` does, images by the bytes of their files: near images, and dropping
what is found, are that command's.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jvlm.data.content import Conversation, Document, media_sources
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.examples import parse_example
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.images import content_digest
from jvlm.data.mixture.order import spread_over
from jvlm.data.prepare.facts import texts_of
from jvlm.data.prepare.ngrams import NgramIndex
from jvlm.errors import UserError

_SAMPLE = 5000  # examples of a set
_SHOWN = 3  # pairs of examples
_WORDS = 60  # characters of what they share


class Shared(NamedTuple):
    """A held-out example that a training example gives away, and by what: the words, or an image."""

    name: str
    item: Origin
    example: Origin
    by: Literal["words", "image"]
    words: str = ""

    def described(self) -> str:
        """Return what is shared, and where."""
        what = f"{self.words[:_WORDS]!r}" if self.words else "an image"
        return f"{what} of {self.item} in {self.example}"


@dataclasses.dataclass(frozen=True)
class HeldOutFiles:
    """Files of a held-out set, and how they are read."""

    files: tuple[str, ...]
    options: FormatOptions = FormatOptions()


class HeldOut:
    """The words and images of sets that are not trained on.

    Args:
      sets: name -> files of each.
      media_root: folder for relative media paths, after the data file's own.
      sample: take the words alone of up to 5,000 examples of each set, which opens no image and takes a second.

    Attributes:
      problems: name -> why the files of a set cannot be read, and are not looked for.
      sizes: name -> examples of a set that are looked for.
    """

    def __init__(self, sets: Mapping[str, HeldOutFiles], media_root: str | None = None, *, sample: bool = False):
        self.problems: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        # what is not looked for: examples that cannot be read, texts of few words, runs that many examples have
        self.unreadable: dict[str, int] = defaultdict(int)
        self.too_short: dict[str, int] = {}
        self.common: dict[str, int] = {}
        self._words: dict[str, NgramIndex] = {}
        self._origins: dict[str, list[Origin]] = {}
        self._images: dict[bytes, list[tuple[str, Origin]]] = defaultdict(list)
        for name, given in sets.items():
            try:
                source = ExampleSource(given.files, given.options)
            except (UserError, FileNotFoundError) as error:
                self.problems[name] = str(error)
            else:
                self._add(name, source, media_root, sample)

    def _add(self, name: str, source: ExampleSource, media_root: str | None, sample: bool) -> None:
        index = self._words[name] = NgramIndex()
        origins = self._origins[name] = []
        numbers = spread_over(source, _SAMPLE) if sample else range(len(source))
        self.sizes[name] = len(numbers)
        for item, number in enumerate(numbers):
            origin, record = source[int(number)]
            origins.append(origin)
            try:
                if isinstance(record, ExampleError):
                    raise record
                parsed = parse_example(record, origin)
                digests = set() if sample else set(_media_digests(parsed, media_root))
            except ExampleError:
                self.unreadable[name] += 1
                continue
            for text in texts_of(parsed):
                if text.strip():
                    index.add(item, text)
            for digest in digests:
                self._images[digest].append((name, origin))
        self.too_short[name] = index.too_short
        self.common[name] = index.common  # and the tables are made, before threads search in them

    def shared(self, parsed: Conversation | Document, digests: Iterable[bytes] = ()) -> tuple[Shared, ...]:
        """Return what a training example gives away, each held-out example once by its words and once by an image.

        Args:
          digests: of its images and videos.
        """
        example = parsed.origin
        found: dict[tuple[str, Origin, str], Shared] = {}
        for name, index in self._words.items():
            for text in texts_of(parsed):
                for overlap in index.find(text):
                    item = self._origins[name][overlap.item]
                    found.setdefault((name, item, "words"), Shared(name, item, example, "words", overlap.text))
        for digest in digests:
            for name, item in self._images.get(digest, ()):
                found.setdefault((name, item, "image"), Shared(name, item, example, "image"))
        return tuple(found.values())


class HeldOutCounts:
    """Counts of what training examples give away.

    Args:
      held_out: the sets; None are none.
    """

    def __init__(self, held_out: HeldOut | None):
        self._of = held_out
        # (name, by) -> held-out examples, and how many training examples give some away
        self._items: dict[tuple[str, str], set[Origin]] = defaultdict(set)
        self._examples: dict[tuple[str, str], int] = defaultdict(int)
        self._first: dict[str, list[str]] = defaultdict(list)

    def add(self, shared: Sequence[Shared]) -> None:
        """Count what a training example gives away."""
        for key in dict.fromkeys((one.name, one.by) for one in shared):
            self._examples[key] += 1
        for one in shared:
            items, first = self._items[one.name, one.by], self._first[one.name]
            if one.item not in items and len(first) < _SHOWN:
                first.append(one.described())
            items.add(one.item)

    def lines(self) -> Iterator[str]:
        """Yield what was found, a line for each set."""
        if self._of is None:
            return
        for name, problem in self._of.problems.items():
            yield f"{name}: what the examples share with it is not known: {problem}"
        for name, size in self._of.sizes.items():
            counts = {by: (len(self._items[name, by]), self._examples[name, by]) for by in ("words", "image")}
            missed = {"cannot be read": self._of.unreadable[name]}
            missed |= {"texts are too short to look for": self._of.too_short[name]}
            missed |= {"runs are too common": self._of.common[name]}
            yield (
                f"{name}: of {size:,} held-out examples {counts['words'][0]:,} share a run of words with "
                f"{counts['words'][1]:,} of these, {counts['image'][0]:,} an image with {counts['image'][1]:,}"
                + "".join(f"; {count:,} {what}" for what, count in missed.items() if count)
                + (f" ({'; '.join(self._first[name])})" if self._first[name] else "")
            )


def sampled_lines(shared: Sequence[Sequence[Shared]], looked_at: int) -> Iterator[str]:
    """Yield what a sample of training examples gives away, a line for each held-out set of which there is any."""
    by_set: dict[str, list[Shared]] = defaultdict(list)
    for of_example in shared:
        for name, one in {one.name: one for one in reversed(of_example)}.items():
            by_set[name].append(one)
    for name, found in by_set.items():
        yield (
            f"{name}: {len(found)} of {looked_at} training examples looked at share a run of words with it "
            f"({found[0].described()}); jvlm data check --config counts all"
        )


def _media_digests(parsed: Conversation | Document, media_root: str | None) -> list[bytes]:
    """Return the digest of each image, frame and video file of an example, by its bytes. Raises ExampleError."""
    origin, found = parsed.origin, []
    for part in parsed.media:
        roots = (part.folder or str(Path(origin.file).parent), *([media_root] if media_root else []))
        found += [content_digest(source, origin=origin, roots=roots) for source in media_sources(part)]
    return found

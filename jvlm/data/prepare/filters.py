"""Filters of examples by what can be measured of each: size and shape of images, length, language, repetition, and how
likely a language model finds the text.

All values are measured first and shown as histograms; limits then decide, without measuring again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jvlm.data.content import Conversation, Document
from jvlm.data.conversion import source_identity
from jvlm.data.engines.engine import Engine, InProcess
from jvlm.data.errors import ExampleError, Rejected
from jvlm.data.example_source import ExampleSource
from jvlm.data.formats.example_format import FormatOptions
from jvlm.data.images import open_image
from jvlm.data.prepare.facts import Examples, text_of
from jvlm.data.prepare.keeping import WORK, Found, Kept, keep, prepared_folder
from jvlm.data.prepare.ngrams import words
from jvlm.data.prepare.pieces import Pieces
from jvlm.errors import UserError
from jvlm.progress import Progress

Perplexity = Callable[[Sequence[str]], list[float]]
_BAR, _BINS = 40, 12
_REPEATED_WORDS = 3


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an example must keep to; None for no limit. Examples without images keep to all limits of images.

    Attributes:
      min_side: pixels of the shorter side of each image.
      max_side: pixels of the longer side of each image.
      max_aspect: longer side of an image by its shorter one.
      min_words, max_words: words of all turns together; characters of Chinese or Japanese are words.
      min_characters, max_characters: characters of all turns together.
      max_repetition: share of runs of three words that occur in the text more than once, 0 to 1.
      languages: codes of languages, such as en; texts without words keep to it.
      min_language_probability: of the language that was found; texts whose language is less sure are dropped.
      min_perplexity, max_perplexity: e to the mean loss of a token under the model.
      max_perplexity_share: share of the examples with the highest perplexity to drop, as 0.05.
    """

    min_side: int | None = None
    max_side: int | None = None
    max_aspect: float | None = None
    min_words: int | None = None
    max_words: int | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    max_repetition: float | None = None
    languages: tuple[str, ...] = ()
    min_language_probability: float | None = None
    min_perplexity: float | None = None
    max_perplexity: float | None = None
    max_perplexity_share: float | None = None

    def __post_init__(self):
        share = self.max_perplexity_share
        if share is not None and not 0 < share < 1:
            raise UserError(f"max_perplexity_share is {share}; it must be between 0 and 1")

    @property
    def any(self) -> bool:
        """Return whether there is a limit."""
        return self != Limits()

    @property
    def of_language(self) -> bool:
        """Return whether a limit needs the language."""
        return bool(self.languages) or self.min_language_probability is not None

    @property
    def of_perplexity(self) -> bool:
        """Return whether a limit needs the perplexity."""
        return any(v is not None for v in (self.min_perplexity, self.max_perplexity, self.max_perplexity_share))


# measure -> (name of its lower limit, name of its upper limit)
MEASURES: dict[str, tuple[str | None, str | None]] = {
    "shorter_side": ("min_side", None),
    "longer_side": (None, "max_side"),
    "aspect": (None, "max_aspect"),
    "words": ("min_words", "max_words"),
    "characters": ("min_characters", "max_characters"),
    "repetition": (None, "max_repetition"),
    "language_probability": ("min_language_probability", None),
    "perplexity": ("min_perplexity", "max_perplexity"),
}


def filter_examples(
    files: Sequence[str],
    output: str | Path,
    limits: Limits = Limits(),
    *,
    drop: bool = False,
    language: bool = False,
    perplexity: Perplexity | None = None,
    perplexity_of: str = "",
    on_histograms: Callable[[str], None] = lambda text: None,
    options: FormatOptions = FormatOptions(),
    media_root: str | None = None,
    on_bad_example: Literal["error", "skip"] = "error",
    examples_per_shard: int = 10_000,
    threads: int = 4,
    engine: Engine = InProcess(),
) -> Kept:
    """Measure examples, list those beyond a limit in ``found.jsonl`` of a folder, and with ``drop`` write the others.

    An example counts under the first of its limits; its entry in the list has all of them.

    Args:
      language: whether to find the language, which limits of it do by themselves.
      perplexity: gives that of each of some texts; needed for limits of it. An engine of other processes pickles it.
      perplexity_of: what tells its model from others.
      on_histograms: is given the histograms, before anything is dropped.
      engine: what measures, and writes shards.

    Raises:
      ExampleError: an example that cannot be used, unless skipped.
      UserError: wrong arguments, a missing package, files that cannot be read, a folder that holds shards.
    """
    if drop and not limits.any:
        raise UserError("nothing to drop: give a limit, as --min_side 28")
    if limits.of_perplexity and perplexity is None:
        raise UserError("limits of perplexity need a model: give --model DIR")
    output = prepared_folder(output)
    source = ExampleSource(files, options)
    examples = Examples(source, media_root)
    finds_language = language or limits.of_language
    if finds_language:
        _languages()
    settings = (source_identity(source), finds_language, perplexity_of, media_root, on_bad_example)
    identity = hashlib.sha256(repr(settings).encode()).hexdigest()
    measured: list[dict[str, Any]] = []
    bad: dict[int, Rejected] = {}
    task = _Measure(examples, on_bad_example == "skip", finds_language, perplexity, threads)
    for values, rejected in _measured(task, output, identity, engine):
        if rejected is not None:
            bad[len(measured)] = Rejected(**rejected)
        measured.append(values)
    limits = _resolved(limits, measured)
    on_histograms(histograms(measured, limits))
    found = [one for index, values in enumerate(measured) if (one := _beyond(index, values, limits)) is not None]
    return keep(
        source,
        found,
        output,
        identity=hashlib.sha256(repr((identity, limits)).encode()).hexdigest(),
        drop=tuple({one.reason: None for one in found} or ["none"]) if drop else (),
        bad=bad,
        examples_per_shard=examples_per_shard,
        media_root=media_root,
        more={"limits": {k: v for k, v in dataclasses.asdict(limits).items() if v not in (None, ())}},
        engine=engine,
    )


@dataclasses.dataclass(frozen=True)
class _Measure:
    """(measures, why it cannot be used) of examples: a `jvlm.data.engines.engine.Task`."""

    examples: Examples
    skip: bool
    language: bool
    perplexity: Perplexity | None
    threads: int

    def __call__(self, some: range) -> list[Any]:
        with ThreadPoolExecutor(self.threads) as pool:
            rows = list(pool.map(self._one, some))
        scored = [row for row in rows if row[0].strip()] if self.perplexity is not None else []
        perplexities = self.perplexity([text for text, _, _ in scored]) if scored else ()
        for row, value in zip(scored, perplexities, strict=True):
            row[1]["perplexity"] = value
        return [list(row[1:]) for row in rows]

    def _one(self, index: int) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
        try:
            example = self.examples.parsed(index)
            text = text_of(example)
            roots = self.examples.roots(example.origin)
            return text, measures(example, roots, text, language=self.language), None
        except ExampleError as error:
            if not self.skip:
                raise
            return "", {}, dataclasses.asdict(Rejected.of(error, "bad"))


def _measured(
    task: _Measure, output: Path, identity: str, engine: Engine
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    count = len(task.examples)
    with Progress(total=count, desc="measuring", unit="example") as bar:
        for values in Pieces(output / WORK, "measures", identity, count).run(task, engine):
            yield from map(tuple, values)
            bar.update(len(values))


def measures(
    example: Conversation | Document, roots: tuple[str, ...], text: str, *, language: bool = False
) -> dict[str, Any]:
    """Return what is measured of an example, as `MEASURES` names it: of images the worst. Raises ExampleError."""
    found: dict[str, Any] = {}
    sizes = [
        open_image(i.source, origin=example.origin, roots=(i.folder, *roots) if i.folder else roots).size
        for i in example.images
    ]
    if sizes:
        found["shorter_side"] = min(map(min, sizes))
        found["longer_side"] = max(map(max, sizes))
        found["aspect"] = max(max(size) / min(size) for size in sizes)
    said = words(text)
    found["words"], found["characters"] = len(said), len(text)
    found["repetition"] = repetition(said)
    if language and said:
        found["language"], found["language_probability"] = language_of(text)
    return found


def repetition(said: Sequence[str]) -> float:
    """Return the share of runs of three words that occur more than once; 0 of a text with fewer words."""
    runs = Counter(zip(*(said[k:] for k in range(_REPEATED_WORDS)), strict=False))
    return sum(n for n in runs.values() if n > 1) / max(runs.total(), 1)


def language_of(text: str) -> tuple[str, float]:
    """Return the code of a text's language and its probability. Raises UserError without py3langid."""
    code, probability = _languages().classify(text)
    return str(code), float(probability)


@functools.cache
def _languages() -> Any:
    try:
        langid = importlib.import_module("py3langid.langid")
    except ImportError as error:
        raise UserError("languages are found with py3langid: pip install 'jvlm[prepare]'") from error
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def _resolved(limits: Limits, measured: Sequence[dict[str, Any]]) -> Limits:
    """Return the limits with a share of the perplexity as a number."""
    values = sorted(one["perplexity"] for one in measured if "perplexity" in one)
    if limits.max_perplexity_share is None or not values:
        return limits
    # so many from the top are above the limit
    above = math.floor(limits.max_perplexity_share * len(values))
    limit = values[len(values) - 1 - above]
    least = limit if limits.max_perplexity is None else min(limit, limits.max_perplexity)
    return dataclasses.replace(limits, max_perplexity=least, max_perplexity_share=None)


def _beyond(index: int, values: dict[str, Any], limits: Limits) -> Found | None:
    """Every limit that an example does not keep to."""
    reasons: dict[str, Any] = {}
    for name, (low, high) in MEASURES.items():
        value = values.get(name)
        lowest = None if low is None else getattr(limits, low)
        highest = None if high is None else getattr(limits, high)
        if value is not None and lowest is not None and value < lowest:
            reasons[low] = value
        if value is not None and highest is not None and value > highest:
            reasons[high] = value
    if limits.languages and values.get("language") is not None and values["language"] not in limits.languages:
        reasons["languages"] = values["language"]
    return Found(index, next(iter(reasons)), {"values": reasons}) if reasons else None


def histograms(measured: Sequence[dict[str, Any]], limits: Limits = Limits()) -> str:
    """Return a histogram of each measure for the terminal; `<` marks bins that a limit cuts off wholly or in part."""
    blocks = []
    for name, (low, high) in MEASURES.items():
        values = np.array([one[name] for one in measured if name in one], np.float64)
        if len(values):
            lowest = None if low is None else getattr(limits, low)
            highest = None if high is None else getattr(limits, high)
            blocks.append(_histogram(name, values, lowest, highest))
    languages = Counter(one["language"] for one in measured if "language" in one)
    if languages:
        most = languages.most_common(_BINS)
        rows = [
            f"  {code:>10}  {_bar(n, most[0][1])} {n:,}"
            + (" <" if limits.languages and code not in limits.languages else "")
            for code, n in most
        ]
        blocks.append("\n".join(["language", *rows]))
    return "\n\n".join(blocks)


def _histogram(name: str, values: np.ndarray, low: float | None, high: float | None) -> str:
    # long tails would leave everything else in one bin: edges are of equal ratio where values spread widely
    spread = values.min() > 0 and values.max() > 20 * np.median(values)
    edges = (
        np.geomspace(values.min(), values.max(), _BINS + 1)
        if spread
        else np.linspace(values.min(), values.max(), _BINS + 1)
    )
    counts, _ = np.histogram(values, edges)
    quantiles = ", ".join(f"{q:.0%} {np.quantile(values, q):,.4g}" for q in (0.05, 0.5, 0.95))
    limits = [f"{word} {limit:g}" for word, limit in (("at least", low), ("at most", high)) if limit is not None]
    rows = [f"{name} ({len(values):,} examples; {quantiles}){': ' + ', '.join(limits) if limits else ''}"]
    for start, end, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True):
        cut = (low is not None and start < low) or (high is not None and end > high)
        rows.append(f"  {start:>10,.4g}  {_bar(count, counts.max())} {count:,}{' <' if cut and count else ''}")
    return "\n".join(rows)


def _bar(count: int, most: int) -> str:
    return "#" * math.ceil(_BAR * count / max(most, 1))

"""The beginning of a run as it will be drawn and packed, from the headers of its images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jvlm.data import lengths, pipeline
from jvlm.data.config import DataConfig
from jvlm.data.encode import Known
from jvlm.data.mixture.examples import Draws, Examples
from jvlm.data.mixture.shares import measured_unit
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.data.sources import sources_of
from jvlm.data.view.histogram import COLOURS, WIDTH

HEIGHT = 14  # of the bar of a sequence
_DRAWS = 20_000  # counted of a run
_SEQUENCES = 24  # shown


@dataclasses.dataclass(frozen=True)
class DrawnSource:
    """A source among the first draws of a run.

    Attributes:
      examples: that it has.
      draws: how often it is among the draws.
      share: of the draws.
      passes: over the source that these are.
    """

    name: str
    examples: int
    draws: int
    share: float
    passes: float


@dataclasses.dataclass(frozen=True)
class Segment:
    """An example in the bar of its sequence: left edge and width in pixels, and what it says."""

    x: float
    width: float
    colour: str
    label: str


@dataclasses.dataclass(frozen=True)
class Drawn:
    """How a run begins.

    Attributes:
      draws: that are counted.
      assumed: draws of a run that were assumed, since a schedule or ``max_epochs`` counts in shares of it; None where
        nothing had to be.
      sources: of the mixture; empty if there is none.
      window: examples that are packed together.
      sequences: the first ones, with the examples in each.
      tokens, patches: shares of the window's sequences that are no padding.
    """

    draws: int
    assumed: int | None
    sources: tuple[DrawnSource, ...]
    window: int
    sequences: tuple[tuple[Segment, ...], ...]
    count: int
    tokens: float
    patches: float


def planned(processor: Processor, config: DataConfig, checked: Sequence[DataConfig]) -> DataConfig:
    """Return the configuration with what the plan of a run wants to know.

    Sizes of sequences are the largest that the checks of its sources chose, means of the mixture's unit are measured,
    and a run whose length nobody gave, and its mixture wants, is one pass.

    Args:
      checked: configurations of the sources, with sizes.
    """
    sizes = {name: max(getattr(one, name) for one in checked) for name in ("seq_len", "max_patches")}
    config = dataclasses.replace(config, **sizes)
    if config.mixture is None:
        return config
    examples = Examples.open(config)
    if measured_unit(config.mixture) and not config.measured:
        config = dataclasses.replace(config, measured=lengths.means(processor, config, examples))
    sources = config.mixture.sources().values()
    if config.run_examples is None and (config.mixture.schedule or any(one.max_epochs for one in sources)):
        config = dataclasses.replace(config, run_examples=max(1, round(examples.shares(config).examples_per_pass)))
    return config


def drawn(
    processor: Processor, config: DataConfig, *, seed: int, assumed: int | None = None, known: Known | None = None
) -> Drawn:
    """Return how a run begins.

    Args:
      config: of the run, as `planned` returns it.
      assumed: see `Drawn`.
      known: as of `Encode`.
    """
    sequences, draws = pipeline.first_sequences(processor, config, seed=seed, known=known)
    counted = min(_DRAWS, draws.plan.examples_per_pass)
    used = [sum(e.length for e in one) for one in sequences], [sum(e.num_patches for e in one) for one in sequences]
    space = len(sequences) * config.seq_len, len(sequences) * config.max_patches
    tokens, patches = (sum(some) / whole if whole else 0.0 for some, whole in zip(used, space, strict=True))
    numbers = _numbers(draws, config)
    return Drawn(
        draws=counted,
        assumed=assumed,
        sources=_sources(draws, counted) if config.mixture is not None else (),
        window=min(config.window(len(draws.examples)), len(draws)),
        sequences=tuple(_bar(one, numbers, config) for one in sequences[:_SEQUENCES]),
        count=len(sequences),
        tokens=tokens,
        patches=patches,
    )


def _sources(draws: Draws, counted: int) -> tuple[DrawnSource, ...]:
    sizes, numbers = draws.examples.sizes(), draws.plan.drawn(counted).tolist()
    return tuple(
        DrawnSource(name, sizes[name], number, number / max(counted, 1), number / sizes[name])
        for name, number in zip(draws.plan.names, numbers, strict=True)
    )


def _numbers(draws: Draws, config: DataConfig) -> dict[str, int]:
    """Return the number of each source, as the page has them: by its path in the mixture, or by each of its files."""
    if config.mixture is not None:
        return {name: number for number, name in enumerate(draws.examples.names)}
    files = sources_of(config.train).values()
    return {path: number for number, paths in enumerate(files) for path in paths}


def _bar(sequence: Sequence[Example], numbers: Mapping[str, int], config: DataConfig) -> tuple[Segment, ...]:
    segments, at = [], 0
    for example in sequence:
        source = example.origin.source
        colour = COLOURS[numbers[source or example.origin.file] % len(COLOURS)]
        label = f"{example.origin}: {example.length:,} tokens, {example.num_patches:,} patches"
        x, width = WIDTH * at / config.seq_len, WIDTH * example.length / config.seq_len
        segments.append(Segment(x, width, colour, f"{source}, {label}" if source else label))
        at += example.length
    return tuple(segments)

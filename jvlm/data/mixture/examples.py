"""The examples of a run: those of all its sources, and which of them each draw takes."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jvlm.data.config import DataConfig
from jvlm.data.errors import Origin
from jvlm.data.example_source import ExampleSource
from jvlm.data.few_shot import FewShotSource
from jvlm.data.mixture.config import Mixture, Source
from jvlm.data.mixture.order import BlockOrder, order_of, source_seed
from jvlm.data.mixture.plan import Plan, average_shares, enters, plan_of
from jvlm.data.mixture.shares import Shares, SourceSize, measured_unit
from jvlm.data.sources import sources_of
from jvlm.data.subset import Subset
from jvlm.errors import UserError

_TRAIN = "train"  # the one source of ``data.train``


def mixture_of(config: DataConfig) -> Mixture:
    """Return the mixture of a configuration; that of ``data.train`` has one source."""
    return config.mixture or Mixture(members={_TRAIN: Source(files=config.train)})


def config_of(config: DataConfig, source: Source) -> DataConfig:
    """Return the configuration with which a source would be read alone."""
    return dataclasses.replace(
        config,
        train=source.files,
        mixture=None,
        format=source.format,
        columns=source.columns,
        loss=source.loss or config.loss,
        shuffle=source.shuffle or config.shuffle,
        media_root=source.media_root or config.media_root,
        documents=source.documents or config.documents,
        few_shot=source.few_shot or config.few_shot,
    )


class _Named:
    """The examples of a source, with its path in their origins."""

    def __init__(self, part: ExampleSource | Subset, name: str):
        self.part, self.name = part, name

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[Origin, Any]:
        origin, record = self.part[index]
        return (dataclasses.replace(origin, source=self.name) if self.name else origin), record


class Examples:
    """The examples of the sources that a configuration draws from, one source after the other.

    Args:
      parts: examples of each source by its path in the tree.
      is_mixture: whether the sources are of a mixture; else there is one, the files of ``data.train``.

    Attributes:
      names: paths of the sources.
      parts: their examples.
    """

    def __init__(self, parts: Mapping[str, ExampleSource | Subset], *, is_mixture: bool):
        self.names, self.parts, self.is_mixture = tuple(parts), tuple(parts.values()), is_mixture
        self._starts = np.cumsum([0, *map(len, self.parts)])
        self._readers: list[_Named | FewShotSource] = [
            _Named(part, name if is_mixture else "") for name, part in self._named()
        ]

    @classmethod
    def open(cls, config: DataConfig) -> Examples:
        """Open the files of all sources with a weight.

        Raises:
          UserError: a source without files, or with files that cannot be read; names the source.
        """
        parts, problems = {}, []
        for name, source in enters(mixture_of(config)).items():
            try:
                if config.mixture is not None and not source.files:
                    raise UserError("no files; give some, or weight 0")
                parts[name] = ExampleSource.of(config_of(config, source) if config.mixture else config)
            except UserError as error:
                problems.append(str(error) if config.mixture is None else f"data.mixture, source {name!r}: {error}")
        if problems:
            raise UserError("\n  ".join(problems))
        if not parts:
            raise UserError("data.mixture: no member has a weight: nothing to draw from")
        return cls(parts, is_mixture=config.mixture is not None)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[Origin, Any]:
        """(origin, with the path of the source if there is a mixture; record) of an example."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.of_source(part, index - int(self._starts[part]))

    def of_source(self, part: int, index: int) -> tuple[Origin, Any]:
        """As indexing, by number of the source and index in it."""
        return self._readers[part][index]

    def with_few_shot(self, config: DataConfig, seed: int) -> Examples:
        """Return these examples with demonstrations before each, of its own source, where the configuration says so."""
        sources = mixture_of(config).sources()
        wanted = [sources[name].few_shot or config.few_shot for name in self.names]
        if not any(wanted):
            return self
        examples = Examples(dict(self._named()), is_mixture=self.is_mixture)
        examples._readers = [
            reader if few_shot is None else FewShotSource(reader, few_shot, seed)
            for reader, few_shot in zip(examples._readers, wanted, strict=True)
        ]
        return examples

    def __repr__(self) -> str:  # Grain's checkpoints compare it
        return f"Examples({dict(zip(self.names, self.parts, strict=True))})"

    @property
    def files(self) -> list[str]:
        """Files of all sources."""
        return [path for part in self.parts for path in part.files]

    def counts(self) -> dict[str, int]:
        """Examples of each file; of a mixture, after the path of its source."""
        if not self.is_mixture:
            return self.parts[0].counts()
        return {f"{n}:{file}": k for n, part in self._named() for file, k in part.counts().items()}

    def formats(self) -> list[str]:
        """Return what the examples of each file or glob are taken for, one line each."""
        return [
            f"{name}, {line}" if self.is_mixture else line for name, part in self._named() for line in part.formats()
        ]

    def sizes(self) -> dict[str, int]:
        """Examples of each source."""
        return {name: len(part) for name, part in self._named()}

    def distinct(self) -> list[int]:
        """Return the index of each example once, where ``FILE#N`` repeats some."""
        starts = map(int, self._starts[:-1])
        return [start + index for start, part in zip(starts, self.parts, strict=True) for index in part.distinct()]

    def subset(self, indices: Sequence[int]) -> Examples:
        """Return these of the examples.

        Raises:
          UserError: a source of a mixture is left without any.
        """
        indices, parts = np.asarray(indices, np.int64), {}
        for start, end, (name, part) in zip(self._starts, self._starts[1:], self._named(), strict=False):
            inside = indices[(indices >= start) & (indices < end)] - start
            if not len(inside) and len(indices):
                raise UserError(f"data.mixture: no example of source {name!r} is left to train on; give it weight 0")
            parts[name] = Subset(part, inside)
        return Examples(parts, is_mixture=self.is_mixture)

    def groups(self, config: DataConfig) -> dict[str, list[int]]:
        """Return the indices of each source of a mixture, or of each file or glob of ``data.train``."""
        if self.is_mixture:
            return {
                name: list(range(int(start), int(end)))
                for name, start, end in zip(self.names, self._starts, self._starts[1:], strict=False)
            }
        bounds, at = {}, 0
        for path, count in self.counts().items():
            bounds[path], at = range(at, at + count), at + count
        return {name: [i for f in files for i in bounds[f]] for name, files in sources_of(config.train).items()}

    def _named(self) -> Iterator[tuple[str, ExampleSource | Subset]]:
        return zip(self.names, self.parts, strict=True)

    def plan(self, config: DataConfig) -> Plan:
        """Return which source each draw takes.

        Raises:
          UserError: the unit of the weights has to be measured first; see also `plan_of`.
        """
        return plan_of(mixture_of(config), self._sizes(config), config.run_examples)

    def shares(self, config: DataConfig) -> Shares:
        """Return the share of each source in the run. Raises as `plan`."""
        return average_shares(mixture_of(config), self._sizes(config))

    def _sizes(self, config: DataConfig) -> dict[str, SourceSize]:
        mixture = mixture_of(config)
        means: Sequence[float | None] = config.measured or [None] * len(self.names)
        if measured_unit(mixture) and len(config.measured) != len(self.names):
            raise UserError(
                f"data.mixture: weights of unit {measured_unit(mixture)!r} need what the examples of each source are "
                f"like, data.measured: {len(self.names)} numbers, got {len(config.measured)}; jvlm train measures them"
            )
        return {name: SourceSize(len(part), mean) for (name, part), mean in zip(self._named(), means, strict=True)}


class Drawn(NamedTuple):
    """An example that is drawn.

    Attributes:
      origin, record: of the example.
      seed: of whatever is drawn for it: of its source, and how many of that were drawn before. Other sources do not
        change it.
    """

    origin: Origin
    record: Any
    seed: tuple[int, int]


class Draws:
    """The examples of a run in the order of training, by number of the draw; a pure function of it.

    Args:
      seed: of the run.
      passes: over the mixture; None is endless.
    """

    def __init__(self, examples: Examples, config: DataConfig, *, seed: int, passes: int | None = None):
        self.examples, self.passes, self.plan = examples, passes, examples.plan(config)
        sources = mixture_of(config).sources()
        self.seeds = [source_seed(seed, name) for name in examples.names]
        self._orders = [
            order_of(part, sources[name].shuffle or config.shuffle, own)
            for name, part, own in zip(examples.names, examples.parts, self.seeds, strict=True)
        ]

    def __len__(self) -> int:
        return sys.maxsize if self.passes is None else self.passes * self.plan.examples_per_pass

    def __getitem__(self, draw: int) -> Drawn:
        source, key = self.plan[draw]
        return Drawn(*self.examples.of_source(source, self._orders[source][key]), (self.seeds[source], key))

    def windows_in_a_row(self, window: int, processes: int) -> int:
        """Return how many packing windows a process takes before others have their turn.

        It is 1, but where files are copied as they are read, and in an order in which neighbouring draws are of the
        same files: then the processes divide a pass. A schedule of weights wants its draws in their order.

        Args:
          window: draws in it.
        """
        is_copied = any(isinstance(order, BlockOrder) and order.files is not None for order in self._orders)
        if not is_copied or len(self.plan.phases) > 1:
            return 1
        return max(1, self.plan.examples_per_pass // (window * processes))

    def __repr__(self) -> str:  # Grain's checkpoints compare it
        return f"Draws({self.examples}, {self.plan})"

"""A mixture of data sources as a tree of names: the settings alone, which import no reader of data."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from jvlm.data.choices import LossChoice, Order
from jvlm.data.document_config import DocumentConfig
from jvlm.data.few_shot_config import FewShot
from jvlm.errors import UserError
from jvlm.validation import check_fields

Unit = Literal["examples", "times", "tokens", "loss_tokens", "patches", "sequences"]
# what weights of these units are shares of has to be measured
MEASURED: tuple[Unit, ...] = ("tokens", "loss_tokens", "patches", "sequences")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclasses.dataclass(frozen=True)
class Source:
    """A data source of a mixture: files that are read alike and drawn from as one.

    Attributes:
      files: files or globs, as ``data.train`` takes them.
      weight: of this source beside the other members of its mixture, whose ``unit`` says what of; 0 leaves it out.
      format: form of its examples; "auto" recognises it.
      columns: new names of its columns, as OLD=NEW; NEW "_" hides a column.
      loss: what has a loss, in the place of ``data.loss``.
      shuffle: order of its examples, in the place of ``data.shuffle``.
      max_epochs: most passes over it in the run; what it would give beyond is shared out among the other sources.
      media_root: folder for its relative media paths, in the place of ``data.media_root``.
      documents: how its documents are read, in the place of ``data.documents``.
      few_shot: demonstrations before its examples, in the place of ``data.few_shot``.
    """

    files: tuple[str, ...] = ()
    weight: float = 1.0
    format: str = "auto"
    columns: tuple[str, ...] = ()
    loss: LossChoice | None = None
    shuffle: Order | None = None
    max_epochs: float | None = None
    media_root: str | None = None
    documents: DocumentConfig | None = None
    few_shot: FewShot | None = None

    def __post_init__(self):
        check_fields(self, "source.", {"weight": "[0, inf)", "max_epochs": "(0, inf)"})


@dataclasses.dataclass(frozen=True)
class Phase:
    """A change of weights in the course of a run.

    Attributes:
      start: share of the run's examples that come before the change.
      weights: new weights of members, named by their path in the tree ("single/math"); the others keep theirs.
      end: where the change is complete; weights go there in ten equal steps. None changes at once.
    """

    start: float
    weights: Mapping[str, float]
    end: float | None = None

    def __post_init__(self):
        check_fields(self, "phase.", {"start": "[0, 1)", "end": "(0, 1]"})
        if self.end is not None and self.end <= self.start:
            raise UserError(f"phase.end {self.end:g} must lie after phase.start {self.start:g}")
        for name, weight in self.weights.items():
            _check_weight(f"phase.weights of {name!r}", weight)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Data sources that are drawn from by weight: a tree of names, whose leaves are sources.

    Attributes:
      members: by name. Weights are relative within a mixture, and multiply down the tree.
      weight: of this mixture beside the other members of the one around it; 0 leaves it out.
      unit: what the weights of its members are shares of: "examples" drawn; "tokens", "loss_tokens" or "patches" of
        them; packed "sequences", each of one source (for the whole tree only). "times": passes over each member for one
        pass over the mixture, as in ms-swift's FILE#N. None takes that of the mixture around it, at the root examples.
      temperature: takes the number of examples of each member to this power as its weight: 1 draws in proportion to
        their size, 0 from all alike. None takes the weights.
      schedule: changes of weights in the course of the run, ascending; of the root only.
    """

    members: Mapping[str, Source | Mixture] = dataclasses.field(default_factory=dict)
    weight: float = 1.0
    unit: Unit | None = None
    temperature: float | None = None
    schedule: tuple[Phase, ...] = ()

    def __post_init__(self):
        check_fields(self, "mixture.", {"weight": "[0, inf)", "temperature": "[0, inf)"})
        for name, member in self.members.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise UserError(f"mixture: {name!r} is no name of a member; take letters, digits, - and _")
            if not isinstance(member, Source | Mixture):
                raise UserError(f"mixture: member {name!r} is a {type(member).__name__}, not a Source or a Mixture")
            if isinstance(member, Mixture):
                _check_inner(name, member, self.unit)
        if self.temperature is not None and self.unit not in (None, "examples"):
            raise UserError(f"mixture: temperature takes the place of weights; unit {self.unit!r} is of weights")
        self._check_schedule()

    def _check_schedule(self) -> None:
        known = dict(self.walk())
        last = -math.inf
        for phase in self.schedule:
            if phase.start < last:
                raise UserError(
                    f"mixture.schedule: a phase starts at {phase.start:g}, before the last one ends ({last:g})"
                )
            last = phase.start if phase.end is None else phase.end
            for path in phase.weights:
                if path not in known:
                    raise UserError(f"mixture.schedule: no member {path!r}; known: {', '.join(known)}")

    def walk(self, prefix: str = "") -> Iterator[tuple[str, Source | Mixture]]:
        """Yield (path, member) of the whole tree, "single" before "single/math"."""
        for name, member in self.members.items():
            yield prefix + name, member
            if isinstance(member, Mixture):
                yield from member.walk(f"{prefix}{name}/")

    def map_sources(self, of: Callable[[Source], Source]) -> Mixture:
        """Return the mixture with another source for each."""
        members = {
            name: member.map_sources(of) if isinstance(member, Mixture) else of(member)
            for name, member in self.members.items()
        }
        return dataclasses.replace(self, members=members)

    def map_files(self, of: Callable[[str], str]) -> Mixture:
        """Return the mixture with another name for each file."""
        return self.map_sources(lambda source: dataclasses.replace(source, files=tuple(map(of, source.files))))

    def sources(self) -> dict[str, Source]:
        """Return path -> source of each leaf, in order."""
        return {path: member for path, member in self.walk() if isinstance(member, Source)}


def _check_inner(name: str, inner: Mixture, unit: Unit | None) -> None:
    if inner.schedule:
        raise UserError(f"mixture: {name!r} has a schedule; give it to the root, with the paths of members")
    if inner.unit == "sequences" and unit != "sequences":
        raise UserError(f"mixture: {name!r} has unit 'sequences', which is for the whole tree: give it to the root")


def _check_weight(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{name} must be a number of at least 0, got {value!r}")

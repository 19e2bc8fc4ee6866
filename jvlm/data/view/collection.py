"""What a page shows of a source: its counts, and which of its examples to look at, chosen while they are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping

import numpy as np

from jvlm.data.check import Checked, Tally
from jvlm.data.errors import Rejected
from jvlm.data.view.equal_images import EqualImages
from jvlm.data.view.near_images import NearImages
from jvlm.data.view.remarks import Remarks

_FIRST = 3  # rejected examples shown of each fault
_FAULTS = 100  # faults of a source of which examples are shown

Fault = tuple[str, ...]

_EXTREMES: dict[str, Callable[[Checked], int]] = {
    "most tokens": lambda checked: sum(size.length for size in checked.sizes),
    "fewest tokens": lambda checked: -sum(size.length for size in checked.sizes),
    "most patches": lambda checked: sum(size.num_patches for size in checked.sizes),
    "most images": lambda checked: checked.images if checked.images > 1 else 0,
}


@dataclasses.dataclass
class SourceView:
    """A source as the page shows it.

    Attributes:
      samples: most usable examples to draw.
      tally: its counts.
      drawn: indices of usable examples, each with the same probability.
      rejected: (index, error) of the first examples of each fault.
      remarks: on its usable examples.
    """

    name: str
    samples: int
    rng: np.random.Generator
    tally: Tally = dataclasses.field(default_factory=Tally)
    drawn: list[int] = dataclasses.field(default_factory=list)
    rejected: dict[Fault, list[tuple[int, Rejected]]] = dataclasses.field(default_factory=dict)
    remarks: Remarks = dataclasses.field(default_factory=Remarks)
    _extremes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def add(self, index: int, checked: Checked, *, is_distinct: bool) -> None:
        """Count an example, and keep its index where it is to be shown.

        Args:
          is_distinct: whether it is the first time that the source gives it.
        """
        self.tally.add(checked)
        fault = checked.rejected
        if fault is not None:
            if fault.fault in self.rejected or len(self.rejected) < _FAULTS:
                first = self.rejected.setdefault(fault.fault, [])
                first += [(index, fault)] if len(first) < _FIRST else []
            return
        if checked.contents is not None and is_distinct:
            self.remarks.add(index, checked.contents)
        # reservoir sampling (Vitter's algorithm R)
        if len(self.drawn) < self.samples:
            self.drawn.append(index)
        else:
            replaced = int(self.rng.integers(self.tally.usable))
            if replaced < self.samples:
                self.drawn[replaced] = index
        for name, value_of in _EXTREMES.items():
            value = value_of(checked)
            if value and (name not in self._extremes or value > self._extremes[name][0]):
                self._extremes[name] = value, index

    def chosen(self) -> dict[int, str]:
        """Return index -> why it is shown: the drawn examples in order, then the extremes."""
        why = dict.fromkeys(sorted(self.drawn), "drawn")
        for name, (_, index) in self._extremes.items():
            why[index] = f"{why[index]}, {name}" if index in why else name
        return why


class Collection:
    """The sources of one check.

    Args:
      names: name of the source of each file.
      samples: most usable examples to draw of each.
      seed: of the draws.
      distinct: indices of examples whose images are compared; None: of all.
      equal, near: take the digests and the perceptual hashes of their images.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        samples: int,
        seed: int,
        *,
        distinct: Container[int] | None,
        equal: EqualImages,
        near: NearImages,
    ):
        self._names, self._distinct, self._equal, self._near = names, distinct, equal, near
        self.sources = {
            name: SourceView(name, samples, np.random.default_rng((seed, number)))
            for number, name in enumerate(dict.fromkeys(names.values()))
        }

    def add(self, index: int, checked: Checked) -> None:
        """Count an example with its source."""
        name = self._names[checked.file]
        is_distinct = self._distinct is None or index in self._distinct
        self.sources[name].add(index, checked, is_distinct=is_distinct)
        if is_distinct:
            self._equal.add(name, index, checked.digests)
            self._near.add(name, index, checked.hashes, checked.digests)

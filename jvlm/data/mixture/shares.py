"""From the weights of a tree to the share of the examples that each source gives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction

from jvlm.data.mixture.config import MEASURED, Mixture, Source, Unit
from jvlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class SourceSize:
    """What shares are computed from.

    Attributes:
      examples: of the source.
      mean: of what the mixture's unit counts (tokens, loss tokens, patches, sequences) per example, as measured; None
        where nothing was.
    """

    examples: int
    mean: float | None = None


@dataclasses.dataclass(frozen=True)
class Shares:
    """What a tree of weights comes to.

    Attributes:
      of: share of the examples drawn by path of the source, exact; they sum to 1. Sources that give nothing are absent.
      examples_per_pass: draws that make one pass over the mixture: of unit "times" each member as often as its weight
        says, else as many draws as there are examples.
    """

    of: Mapping[str, Fraction]
    examples_per_pass: Fraction


def measured_unit(mixture: Mixture) -> Unit | None:
    """Return the unit of the tree that needs a measurement.

    Raises:
      UserError: there are two.
    """
    units = {m.unit for m in (mixture, *(m for _, m in mixture.walk())) if isinstance(m, Mixture)} & {*MEASURED}
    if len(units) > 1:
        raise UserError(f"mixture: weights are shares of {' and of '.join(sorted(units))}; take one of them")
    return next(iter(units), None)


def shares_of(mixture: Mixture, sizes: Mapping[str, SourceSize], weights: Mapping[str, float] = {}) -> Shares:
    """Return the share of the examples of each source.

    A member m of a mixture is drawn in proportion to q: its weight w for unit "examples", w x the examples of a pass
    over it for "times", w / (mean of the unit per example) for measured units, examples^T with a temperature T.

    Args:
      sizes: by path of the source; sources without an entry must have weight 0.
      weights: by path, in the place of those of the tree.

    Raises:
      UserError: all members of a mixture have weight 0; a source that counts is empty or has a mean of 0.
    """
    share, passes, _ = _node(mixture, "", mixture.unit or "examples", sizes, weights)
    return Shares({path: value for path, value in share.items() if value}, passes)


# share of each source, examples of a pass, mean of the unit per example
_Node = tuple[dict[str, Fraction], Fraction, Fraction | None]


def _node(
    mixture: Mixture, prefix: str, unit: Unit, sizes: Mapping[str, SourceSize], weights: Mapping[str, float]
) -> _Node:
    inner: dict[str, _Node] = {}
    parts: dict[str, Fraction] = {}
    for name, member in mixture.members.items():
        path = prefix + name
        weight = _exact(weights.get(path, member.weight))
        if not weight:
            continue
        if isinstance(member, Source):
            inner[path] = _leaf(path, sizes[path])
        else:
            inner[path] = _node(member, f"{path}/", member.unit or unit, sizes, weights)
        parts[path] = _part(path, mixture, unit, weight, inner[path])
    if not parts:
        raise UserError(f"mixture: every member of {prefix.rstrip('/') or 'it'} has weight 0: nothing to draw from")
    total = sum(parts.values())
    share = {leaf: parts[path] / total * q for path in parts for leaf, q in inner[path][0].items()}
    if unit == "times" and mixture.temperature is None:
        passes = sum(_exact(weights.get(path, _member(mixture, path).weight)) * inner[path][1] for path in parts)
    else:
        passes = sum(inner[path][1] for path in parts)
    means = [inner[path][2] for path in parts]
    mean = None if None in means else sum(parts[p] / total * m for p, m in zip(parts, means, strict=True))
    return share, Fraction(passes), mean


def _member(mixture: Mixture, path: str) -> Source | Mixture:
    return mixture.members[path.rpartition("/")[2]]


def _leaf(path: str, size: SourceSize) -> _Node:
    if not size.examples:
        raise UserError(f"mixture: source {path!r} has no examples; give it files, or weight 0")
    return {path: Fraction(1)}, Fraction(size.examples), None if size.mean is None else _exact(size.mean)


def _part(path: str, mixture: Mixture, unit: Unit, weight: Fraction, node: _Node) -> Fraction:
    _, examples, mean = node
    if mixture.temperature is not None:
        return Fraction(math.pow(float(examples), mixture.temperature)) if mixture.temperature else Fraction(1)
    if unit == "times":
        return weight * examples
    if unit in MEASURED:
        if not mean:
            raise UserError(
                f"mixture: {path!r} has no {unit.replace('_', ' ')} of which its weight could be a share; give it "
                "weight 0, or take unit examples"
            )
        return weight / mean
    return weight


def _exact(value: float) -> Fraction:
    """Return the decimal number that a float is written as: 0.1 is a tenth."""
    return Fraction(str(value))

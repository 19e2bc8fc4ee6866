"""One reversible table per family: Hugging Face tensor name <-> parameter path, with an einops pattern.

The table drives loading, export, conversion and name checks. A ``{i}`` in a name is a layer of a stacked parameter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import einops
import numpy as np

from jvlm import families
from jvlm.errors import UserError
from jvlm.families.base import HFFormat
from jvlm.models.vlm import VLMConfig

T = TypeVar("T")


class WeightError(UserError):
    """A checkpoint that does not match its family's table; lists everything that is wrong."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
      name: tensor name in the checkpoint, ``{i}`` for the layer.
      path: dotted parameter path in the model; a stacked parameter has a leading layer axis.
      pattern: einops pattern from checkpoint to parameter (without the layer axis); None leaves it as it is.
      first, step: entry k of the stacked parameter is layer ``first + k * step`` of the checkpoint.
    """

    name: str
    path: str
    pattern: str | None = None
    first: int = 0
    step: int = 1

    @property
    def layered(self) -> bool:
        return "{i}" in self.name


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: its name, the parameter it belongs to, and both shapes."""

    name: str
    path: str
    layer: int | None
    pattern: str | None
    shape: tuple[int, ...]
    sizes: tuple[tuple[str, int], ...] = ()

    def to_param(self, tensor: np.ndarray) -> np.ndarray:
        """Checkpoint layout to parameter layout (a view where possible)."""
        return tensor if self.pattern is None else einops.rearrange(tensor, self.pattern, **self._used(self.pattern))

    def to_checkpoint(self, value: np.ndarray) -> np.ndarray:
        """Parameter layout to checkpoint layout."""
        if self.pattern is None:
            return value
        reverse = " -> ".join(reversed(self.pattern.split(" -> ")))
        return einops.rearrange(value, reverse, **self._used(reverse))

    def _used(self, pattern: str) -> dict[str, int]:
        """einops wants lengths for the axes composed on the left side only."""
        composed = re.findall(r"\(([^)]*)\)", pattern.split(" -> ")[0])
        wanted = {axis for group in composed for axis in group.split()}
        return {axis: size for axis, size in self.sizes if axis in wanted}


def entries(config: VLMConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    """Every tensor that a checkpoint of this configuration holds, in table order.

    Args:
      shapes: parameter path -> shape, of the whole (abstract) model.

    Raises:
      WeightError: the table and the model disagree about which parameters exist.
    """
    form = hf_format(config)
    return expand(form.rules(config), form.axis_sizes(config), shapes)


def expand(rules: Iterable[Rule], sizes: dict[str, int], shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    """Every tensor of a table, a line each layer; see `entries`."""
    rules = list(rules)
    if {r.path for r in rules} != set(shapes):
        lines = [f"parameter without a rule: {p}" for p in sorted(set(shapes) - {r.path for r in rules})]
        lines += [f"rule without a parameter: {p}" for p in sorted({r.path for r in rules} - set(shapes))]
        raise WeightError("table and model disagree:\n  " + "\n  ".join(lines))
    return list(_entries(rules, sizes, shapes))


def _entries(rules: Iterable[Rule], sizes: dict[str, int], shapes) -> Iterator[Entry]:
    for rule in rules:
        shape = shapes[rule.path][1:] if rule.layered else shapes[rule.path]
        used = tuple(sizes.items())
        probe = Entry(rule.name, rule.path, None, rule.pattern, (), used)
        # A view of one zero: gives the checkpoint's shape without its memory.
        stored = probe.to_checkpoint(np.broadcast_to(np.zeros((), np.uint8), shape)).shape
        for layer in range(shapes[rule.path][0]) if rule.layered else (None,):
            name = rule.name.replace("{i}", str(rule.first + layer * rule.step)) if rule.layered else rule.name
            yield Entry(name, rule.path, layer, rule.pattern, stored, used)


def check(expected: Iterable[Entry], actual: dict[str, tuple[int, ...]], source: str) -> None:
    """Compare a checkpoint's tensors (canonical name -> shape) with the expected ones.

    Raises:
      WeightError: one error listing every missing, extra and wrongly shaped tensor.
    """
    expected = {e.name: e.shape for e in expected}
    lines = [f"missing: {name} {expected[name]}" for name in expected if name not in actual]
    lines += [f"unexpected: {name} {actual[name]}" for name in sorted(actual) if name not in expected]
    lines += [
        f"wrong shape: {name} is {actual[name]}, expected {expected[name]}"
        for name in expected
        if name in actual and tuple(actual[name]) != expected[name]
    ]
    if lines:
        raise WeightError(
            f"{source} does not match its configuration ({len(lines)} problems):\n  " + "\n  ".join(lines)
        )


def hf_format(config: VLMConfig) -> HFFormat:
    """Return the Hugging Face form of a model's family. Raises WeightError if it has none."""
    family = families.get(config.family)
    if family.hf is None:
        raise _no_public_form(f"family {config.family!r}")
    return family.hf


def export_format(config: VLMConfig) -> HFFormat:
    """As `hf_format`, for writing a checkpoint: also refuses variants that no public checkpoint has."""
    form = hf_format(config)
    unsupported = form.unsupported(config)
    if unsupported:
        raise _no_public_form(f"family {config.family!r} with {unsupported}")
    return form


def _no_public_form(kind: str) -> WeightError:
    known = [name for name in families.names() if families.get(name).hf is not None]
    return WeightError(
        f"models of {kind} have no Hugging Face form, since no public checkpoint of it exists; known: "
        f"{', '.join(known)}. Save them as a jvlm run folder: jvlm.save(..., format='jvlm'), or "
        "export.enabled = False in an experiment"
    )


def read_values(path: Path, read: Callable[[dict[str, Any]], T], values: dict[str, Any]) -> T:
    """Return ``read(values)`` of a config.json's values.

    Raises:
      WeightError: naming the file, for a value that is missing or that nothing can be computed from.
    """
    try:
        return read(values)
    except KeyError as error:
        raise WeightError(f"{path} has no {error.args[0]!r}; copy the file again, or add the value") from error
    except UserError as error:
        raise WeightError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise WeightError(f"{path} has a value of the wrong kind ({error}); compare it with a published one") from error

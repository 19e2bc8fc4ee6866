"""LoRA on the experts of a mixture as PEFT has it (``target_parameters``): of stacked parameters, not of modules.

A parameter holds the matrices of all experts, and gate and up side by side, with one rank for all. Expert e adds
``scale * a_e b_e``, with a_e [in, r] from lora_A.weight [E r, in], experts one after another, and b_e [r, out] from
lora_B.weight [out, r E], where the expert is the faster index (peft/tuners/lora/layer.py, ParamWrapper). Gate and up
of rank r, each with an input matrix of its own, are one adapter of rank 2 r whose b_e is block diagonal.

A module whose parameters are adapted is wrapped once for each, in the order in which it has them: the last one's
tensors are ``experts.lora_A.weight``, those of the one before ``experts.base_layer.lora_A.weight``.

PEFT takes the inputs to be an axis that the versions of PEFT and transformers do not agree on. With PEFT >= 0.20 and
transformers 5, and with earlier ones of both, lora_A meets the inputs. With one early and one late, lora_A meets the
outputs and lora_B the inputs; such files are read, by their shapes, and never written.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jvlm.adapters import peft_modules
from jvlm.adapters.weights import LowRank, Target
from jvlm.models.vlm import VLMConfig
from jvlm.weights import table
from jvlm.weights.table import Entry

_EXPERT = re.compile(r"\.mlp\.(gate|up|down)")


@dataclasses.dataclass(frozen=True)
class ExpertParameter:
    """A parameter of all experts of a layer.

    Attributes:
      name: as transformers has it in memory ("...layers.0.mlp.experts.gate_up_proj"), in the weight table's spelling.
      parts: the tensors of the weight table that are side by side in it, each [experts, in, out].
    """

    name: str
    parts: tuple[Entry, ...]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def experts(self) -> int:
        return self.parts[0].shape[0]

    @property
    def d_in(self) -> int:
        return self.parts[0].shape[1]

    @property
    def d_out(self) -> int:
        return sum(part.shape[2] for part in self.parts)

    def targets(self) -> list[tuple[Target, ...]]:
        """Return the matrices of each expert, in the order of the parts."""
        return [tuple(Target(p.path, (p.layer, expert)) for p in self.parts) for expert in range(self.experts)]

    def columns(self) -> list[slice]:
        """Return the outputs of each part."""
        ends = list(itertools.accumulate(part.shape[2] for part in self.parts))
        return [slice(end - part.shape[2], end) for end, part in zip(ends, self.parts, strict=True)]

    def shapes(self, rank: int, *, swapped: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of lora_A.weight and lora_B.weight."""
        first, second = (self.d_out, self.d_in) if swapped else (self.d_in, self.d_out)
        return (self.experts * rank, first), (second, rank * self.experts)


class Packed(NamedTuple):
    """The adapter of a parameter as files have it."""

    lora_a: Float[np.ndarray, "Er i"]
    lora_b: Float[np.ndarray, "o rE"]
    rank: int
    scale: float


def parameters(config: VLMConfig) -> dict[str, ExpertParameter]:
    """Return the parameters of experts by name, in the order in which a module has them; none for dense models."""
    fused = {part: whole for whole, parts in table.export_format(config).fused.items() for part in parts}
    parts: dict[str, list[Entry]] = {}
    for entry in peft_modules.entries(config):
        if len(entry.shape) == 3 and _EXPERT.search(entry.path):
            parts.setdefault(fused_name(entry.name, fused), []).append(entry)
    return {name: ExpertParameter(name, tuple(entries)) for name, entries in parts.items()}


def fused_name(name: str, fused: Mapping[str, str]) -> str:
    """Return the name of the tensor that holds another, by the ends of both names; the same one if none does."""
    end = next((part for part in fused if name.endswith(f".{part}")), None)
    return name if end is None else name.removesuffix(end) + fused[end]


def wrappers(adapted: Sequence[ExpertParameter]) -> dict[str, str]:
    """Return the name of the module that holds the adapter of each parameter, by the parameter's name."""
    modules: dict[str, list[str]] = {}
    for parameter in adapted:
        modules.setdefault(parameter.module, []).append(parameter.name)
    return {
        name: module + ".base_layer" * depth
        for module, names in modules.items()
        for depth, name in enumerate(reversed(names))
    }


def pack(parameter: ExpertParameter, low_rank: Mapping[Target, LowRank]) -> Packed:
    """Return the adapter of a parameter; exact, up to the rounding of scales where those of experts differ.

    Experts and parts without an adapter get zeros. Parts that share their input matrices, as those of PEFT do, keep one
    copy of it.
    """
    rows = [[low_rank.get(target) for target in targets] for targets in parameter.targets()]
    present = [low for row in rows for low in row if low is not None]
    scale = max(low.scale for low in present)
    ranks = [max((row[i].rank for row in rows if row[i] is not None), default=0) for i in range(len(parameter.parts))]
    shared = all(_share_input(row) for row in rows)
    begins = [0] * len(ranks) if shared else [0, *itertools.accumulate(ranks)][:-1]
    rank = max(ranks) if shared else sum(ranks)
    a = np.zeros((parameter.experts, rank, parameter.d_in), np.result_type(*(low.a for low in present)))
    b = np.zeros((parameter.d_out, rank, parameter.experts), np.result_type(*(low.b for low in present)))
    for expert, row in enumerate(rows):
        for low, begin, columns in zip(row, begins, parameter.columns(), strict=True):
            if low is not None:
                pairs = slice(begin, begin + low.rank)
                a[expert, pairs] = low.a.T
                factor = low.scale / scale
                b[columns, pairs, expert] = (low.b if factor == 1 else low.b.astype(np.float64) * factor).T
    return Packed(a.reshape(-1, parameter.d_in), b.reshape(parameter.d_out, -1), rank, scale)


def _share_input(row: Sequence[LowRank | None]) -> bool:
    """Return whether the parts of an expert have one input matrix and scale."""
    first = row[0]
    return first is not None and all(
        low is not None and low.scale == first.scale and np.array_equal(low.a, first.a) for low in row
    )


def unpack(
    parameter: ExpertParameter, packed: Packed, *, swapped: bool, use_rslora: bool = False
) -> dict[Target, LowRank]:
    """Return the adapters of the matrices of a parameter.

    A pair of an input and an output vector counts for the parts whose outputs it reaches: that undoes the blocks that
    `pack` makes. One that reaches none in any expert, as all do at first, counts for all.
    """
    E, r = parameter.experts, packed.rank
    if swapped:
        a = packed.lora_b.reshape(parameter.d_in, r, E).transpose(2, 0, 1)
        b = packed.lora_a.reshape(E, r, parameter.d_out)
    else:
        a = packed.lora_a.reshape(E, r, parameter.d_in).transpose(0, 2, 1)
        b = packed.lora_b.reshape(parameter.d_out, r, E).transpose(2, 1, 0)
    columns = parameter.columns()
    reached = np.stack([b[..., part].any(axis=(0, 2)) for part in columns])
    kept = reached | ~reached.any(0)
    result = {}
    for expert, targets in enumerate(parameter.targets()):
        for target, part, pairs in zip(targets, columns, kept, strict=True):
            rank = int(pairs.sum())
            if rank:
                alpha = packed.scale * (math.sqrt(rank) if use_rslora else rank)
                result[target] = LowRank(a[expert][:, pairs], b[expert][pairs, part], packed.scale, alpha)
    return result


def orders(
    shapes: Iterable[tuple[ExpertParameter, int, tuple[int, ...], tuple[int, ...]]],
) -> tuple[bool, ...]:
    """Return which values of ``swapped`` explain the shapes of a file.

    Args:
      shapes: parameter, rank, and the shapes of lora_A.weight and lora_B.weight, of each adapter.
    """
    shapes = list(shapes)
    return tuple(
        swapped
        for swapped in (False, True)
        if all(parameter.shapes(rank, swapped=swapped) == (a, b) for parameter, rank, a, b in shapes)
    )

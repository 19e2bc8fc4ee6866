"""TPU generations in figures, and what a topology's name says."""

from __future__ import annotations

import dataclasses
import math
import re

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one chip; rates a second.

    Attributes:
      flops: dense bfloat16.
      hbm, hbm_bandwidth: bytes.
      link: bytes one way over one link of the fast network; `dimensions` of the torus have a link at each end.
      dcn: bytes one way over the data-centre network, the chip's share of its machine's cards.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    link: float
    dimensions: int
    dcn: float


# FLOP/s, memory and its bandwidth: https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. Links, one way, as those
# pages' "ICI bandwidth per chip" over links and directions, where it agrees with what is measured in "How to Scale
# Your Model", chapter 2 (https://jax-ml.github.io/scaling-book/tpus), which is the lower and is taken. Data-centre
# network: the same chapter's 6.25e9 for v5p; 2 cards of 100 Gbit/s for 8 chips of v5e, 4 of 200 Gbit/s for 8 of v6e.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1.2e12, 45e9, 3, 6.25e9),
    "v5e": Chip(197e12, 16 * GIB, 0.81e12, 45e9, 2, 3.125e9),
    "v5p": Chip(459e12, 95 * GIB, 2.76e12, 90e9, 3, 6.25e9),
    "v6e": Chip(918e12, 32 * GIB, 1.6e12, 90e9, 2, 12.5e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7.37e12, 90e9, 3, 12.5e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips in a torus: "v5p:4x4x4"; several slices as "v5p:4x4x4*2"."""

    name: str
    generation: str
    shape: tuple[int, ...]
    slices: int

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Raises ValueError saying what a name should look like."""
        found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+){1,2})(?:\*(\d+))?", name)
        if not found or found[1] not in CHIPS:
            raise ValueError(f"topology {name!r}: one of {', '.join(CHIPS)}, a colon, a shape: v5p:4x4x4, v6e:16x16*2")
        shape = tuple(map(int, found[2].split("x")))
        if len(shape) != CHIPS[found[1]].dimensions:
            raise ValueError(f"topology {name!r}: {found[1]} is a torus of {CHIPS[found[1]].dimensions} dimensions")
        return cls(name, found[1], shape, int(found[3] or 1))

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def slice_name(self) -> str:
        """As JAX's compiler names one slice."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices


def smaller(topology: Topology) -> Topology | None:
    """Half of a topology: slices first, then the longest side; None where nothing is left to halve."""
    if topology.slices % 2 == 0:
        shape, slices = topology.shape, topology.slices // 2
    else:
        side = max(range(len(topology.shape)), key=lambda i: topology.shape[i])
        if topology.slices > 1 or topology.shape[side] % 2 or math.prod(topology.shape) <= 4:
            return None
        shape, slices = (*topology.shape[:side], topology.shape[side] // 2, *topology.shape[side + 1 :]), 1
    name = f"{topology.generation}:{'x'.join(map(str, shape))}" + (f"*{slices}" if slices > 1 else "")
    return Topology.parse(name)

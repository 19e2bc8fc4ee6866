"""TPU generations and NVIDIA GPUs in figures, and what a topology's name says."""

from __future__ import annotations

import dataclasses
import math
import re

from jvlm.errors import UserError
from jvlm.hardware import PEAK_FLOPS
from jvlm.units import GIB

from .gpus import GPUS


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one chip; rates a second.

    Attributes:
      flops: dense bfloat16.
      hbm, hbm_bandwidth: bytes.
      link: bytes one way over one link of the fast network; `dimensions` of the torus have a link at each end. With no
        dimensions a switch joins the chips of a machine, and this is over all links of a chip, whoever it sends to.
      dcn: bytes one way over the data-centre network, the chip's share of its machine's cards.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    link: float
    dimensions: int
    dcn: float


# Memory and its bandwidth: https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. Links, one way, as those
# pages' "ICI bandwidth per chip" over links and directions, where it agrees with what is measured in "How to Scale
# Your Model", chapter 2 (https://jax-ml.github.io/scaling-book/tpus), which is the lower and is taken. Data-centre
# network: the same chapter's 6.25e9 for v5p; 2 cards of 100 Gbit/s for 8 chips of v5e, 4 of 200 Gbit/s for 8 of v6e.
CHIPS = {
    "v4": Chip(PEAK_FLOPS["v4"], 32 * GIB, 1.2e12, 45e9, 3, 6.25e9),
    "v5e": Chip(PEAK_FLOPS["v5e"], 16 * GIB, 0.81e12, 45e9, 2, 3.125e9),
    "v5p": Chip(PEAK_FLOPS["v5p"], 95 * GIB, 2.76e12, 90e9, 3, 6.25e9),
    "v6e": Chip(PEAK_FLOPS["v6e"], 32 * GIB, 1.6e12, 90e9, 2, 12.5e9),
    "tpu7x": Chip(PEAK_FLOPS["tpu7x"], 192 * GIB, 7.37e12, 90e9, 3, 12.5e9),
}


def _gpu(name: str, link: float, dcn: float) -> Chip:
    return Chip(PEAK_FLOPS[name], GPUS[name].memory, GPUS[name].bandwidth, link, 0, dcn)


# NVLink (half of both ways): NVIDIA's data sheets of A100, H100, H200 (SXM) and DGX B200. Data-centre network: that of
# NVIDIA's own DGX machines, a card for each GPU, of 200 Gbit/s in the first and 400 in the others. Rented machines have
# less, some a quarter: --network says how much.
CHIPS |= {
    "l4": _gpu("l4", 32e9, 6.25e9),  # without NVLink: PCIe 4.0 x16; a card of 100 Gbit/s for two
    "a100": _gpu("a100", 300e9, 25e9),
    "h100": _gpu("h100", 450e9, 50e9),
    "h200": _gpu("h200", 450e9, 50e9),
    "b200": _gpu("b200", 900e9, 50e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """TPU chips in a torus, "v5p:4x4x4", several slices as "v5p:4x4x4*2"; GPUs in machines, "h200:8x8", one "h200:8".

    Attributes:
      shape: of a slice of TPUs; of GPUs, machines and GPUs in each.
      dcn: see `Chip`, where it is not what is usual.
    """

    name: str
    generation: str
    shape: tuple[int, ...]
    slices: int = 1
    dcn: float | None = None

    @classmethod
    def parse(cls, name: str, dcn: float | None = None) -> Topology:
        """Raise UserError saying what a name should look like."""
        match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
        if not match or match[1] not in CHIPS:
            raise UserError(
                f"topology {name!r}: one of {', '.join(CHIPS)}, a colon, a shape: v5p:4x4x4, v6e:16x16*2, or for GPUs "
                "machines and GPUs in each: h200:8x8"
            )
        shape, slices = tuple(map(int, match[2].split("x"))), int(match[3] or 1)
        dimensions = CHIPS[match[1]].dimensions
        if shape == (1,):  # one chip, whatever the torus
            shape = (1,) * (dimensions or 1)
        if dimensions and len(shape) != dimensions:
            raise UserError(
                f"topology {name!r}: {match[1]} is a torus of {dimensions} dimensions, {match[1]}:"
                f"{'x'.join(['2'] * dimensions)}; one chip is {match[1]}:1"
            )
        if not dimensions and (len(shape) > 2 or match[3]):
            raise UserError(f"topology {name!r}: GPUs are so many machines of so many, h200:8x8, or one, h200:8")
        return cls(name, match[1], shape if dimensions or len(shape) == 2 else (1, *shape), slices, dcn)

    @property
    def chip(self) -> Chip:
        usual = CHIPS[self.generation]
        return usual if self.dcn is None else dataclasses.replace(usual, dcn=self.dcn)

    @property
    def switched(self) -> bool:
        """Whether a switch joins the chips of a machine: GPUs."""
        return not self.chip.dimensions

    @property
    def slice_name(self) -> str:
        """As JAX's compiler names one slice of TPUs."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices


def smaller(topology: Topology) -> Topology | None:
    """Half of a topology: slices or machines first, then the longest side; None where nothing is left to halve.

    A machine of GPUs stays whole.
    """
    shape, slices = topology.shape, topology.slices
    if topology.switched:
        machines, each = shape
        if machines % 2:
            return None
        return Topology.parse(f"{topology.generation}:{machines // 2}x{each}", topology.dcn)
    if slices % 2 == 0:
        slices //= 2
    else:
        side = max(range(len(shape)), key=lambda i: shape[i])
        if slices > 1 or shape[side] % 2 or math.prod(shape) <= 4:
            return None
        shape = (*shape[:side], shape[side] // 2, *shape[side + 1 :])
    name = f"{topology.generation}:{'x'.join(map(str, shape))}" + (f"*{slices}" if slices > 1 else "")
    return Topology.parse(name, topology.dcn)

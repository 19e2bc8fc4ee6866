"""Serving on chips that are not there: how many pages and answers fit, requests a second, and what bounds them."""

from __future__ import annotations

import dataclasses

from jvlm.errors import UserError
from jvlm.inference import sharding
from jvlm.inference.abstract import PAGE_SIZE
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig

from . import generation
from .chips import Topology
from .measure import Compiled, devices_of
from .report import Plan
from .roofline import Roofline


@dataclasses.dataclass(frozen=True)
class Load:
    """What every request is taken to be.

    Attributes:
      prompt, patches: tokens and patches of a prompt.
      answer: tokens of an answer.
      image: patches of an image.
      slots: most answers that are decoded together on all chips.
    """

    prompt: int
    patches: int
    answer: int
    image: int
    slots: int


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """An engine on one topology, under one load.

    Attributes:
      groups: engines' worth of slots and pages, each on chips of its own.
      prefill: of one prompt of each group; `decode`: a token of every slot, whose answers are half done.
      page_bytes: of a page on a chip.
      pages: of each group.
      slots: of all groups; 0 where not one request fits.
    """

    topology: Topology
    load: Load
    groups: int
    prefill: Plan
    decode: Plan | None
    page_bytes: float
    pages: int
    slots: int

    @property
    def fits(self) -> bool:
        """Return whether a request can be served."""
        return self.decode is not None and self.decode.fits

    @property
    def is_bounded(self) -> bool:
        """Return whether its speed is known: it fits, and the text of both programs could be read."""
        return self.fits and self.prefill.roofline is not None and self.decode.roofline is not None

    @property
    def _shares(self) -> list[tuple[str, Roofline, float]]:
        """Return each program with how often one request needs it."""
        decode = self.load.answer / self.slots
        return [("prefill", self.prefill.roofline, 1 / self.groups), ("decoding", self.decode.roofline, decode)]

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of all chips that one request takes at least, by what limits them."""
        return {f"{one.limited_by} of {name}": share * one.overlapped for name, one, share in self._shares}

    @property
    def without_overlap(self) -> float:
        """Requests a second if compute, memory and network of a program never overlapped."""
        return 1 / sum(share * one.serial for _, one, share in self._shares)

    @property
    def of_arithmetic(self) -> float:
        """Requests a second if nothing but the arithmetic that a request needs took time, at the chips' peak."""
        needed = sum(share * sum(one.arithmetic.values()) for _, one, share in self._shares)
        return self.topology.chips * self.topology.chip.flops / needed

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        return max(self.parts, key=self.parts.get)

    @property
    def requests_per_second(self) -> float:
        """An upper bound, with every slot taken at all times."""
        return 1 / sum(self.parts.values())

    @property
    def time_per_token(self) -> float:
        """Seconds between two tokens of an answer at that rate."""
        return self.slots / (self.requests_per_second * self.load.answer)

    def values(self) -> dict:
        """For JSON; bytes and seconds."""
        found = {
            "step": "serve",
            "topology": self.topology.name,
            "load": dataclasses.asdict(self.load),
            "groups": self.groups,
            "page_bytes": self.page_bytes,
            "pages": self.pages,
            "slots": self.slots,
            "prefill": self.prefill.values(),
        }
        if self.decode is not None:
            found["decode"] = self.decode.values()
        if self.is_bounded:
            found |= {
                "parts": self.parts,
                "bound": self.bound,
                "requests_per_second": self.requests_per_second,
                "requests_per_second_without_overlap": self.without_overlap,
                "requests_per_second_of_arithmetic": self.of_arithmetic,
                "tokens_per_second": self.requests_per_second * self.load.answer,
                "time_per_token": self.time_per_token,
                "time_to_first_token": self.prefill.roofline.overlapped,
            }
        return found

    def text(self, experiment, price: float | None) -> str:
        """Markdown."""
        load, topology = self.load, self.topology
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.prefill.compiled.mesh.items()) or "one device"
        lines = [f"## {topology.name}: {topology.chips} chips, {mesh}", ""]
        if not self.fits:
            limit = self.prefill.compiled.limit / 2**30
            return "\n".join([*lines, f"- not one request fits beside the parameters ({limit:.1f} GiB a chip)", ""])
        needed = -(-(load.prompt + load.answer) // PAGE_SIZE)
        room = self.groups * ((self.pages - 1) // needed)
        held = "pages" if room < load.slots else "--slots"
        sized = [
            f"- {self.groups} x {self.pages:,} pages of {PAGE_SIZE} tokens ({self.page_bytes / 2**20:.2f} MiB of a "
            f"chip each): {room:,} requests of {needed} pages",
            f"- **{self.slots:,} answers together** (limited by {held})",
        ]
        if not self.is_bounded:
            return "\n".join([*lines, *sized, "- no bound on speed: the compiler's program could not be read", ""])
        seconds = self.requests_per_second
        shares = ", ".join(f"{100 * part * seconds:.0f} % {name}" for name, part in self.parts.items())
        lines += [
            *sized,
            f"- a token of each every {1e3 * self.time_per_token:.1f} ms at least",
            f"- **at most {seconds:,.2f} requests and {seconds * load.answer:,.0f} tokens a second, bound by "
            f"{self.bound}** (time of the chips: {shares}); {self.without_overlap:,.2f} requests without overlap",
            f"- {seconds / self.of_arithmetic:.0%} of the {self.of_arithmetic:,.2f} requests a second that the chips "
            f"have the arithmetic for, {self.without_overlap / self.of_arithmetic:.0%} without overlap",
            f"- the first token after {1e3 * self.prefill.roofline.overlapped:.0f} ms at least",
        ]
        if price:
            cost = price * topology.chips / 3600 / (seconds * load.answer) * 1e6
            lines.append(f"- a million tokens: at least {cost:,.2f} at {price} a chip-hour")
        return "\n".join([*lines, ""])


def plan(
    config: VLMConfig, asked: ParallelConfig | None, topology: Topology, load: Load, template: VLM | None = None
) -> ServingPlan:
    """Compile a prefill of one prompt for each group, then a step of as many answers as fit beside it.

    Args:
      template: the shapes of a model that is quantised or has adapters; None is a plain one.

    Raises:
      UserError: a load without tokens, or a layout that cannot generate.
    """
    for name in ("prompt", "answer", "slots"):
        if getattr(load, name) < 1:
            raise UserError(f"--{name} is {getattr(load, name)}; it must be at least 1")
    devices = devices_of(topology)
    layout = MeshLayout.of(asked or sharding.default_mesh(config, len(devices)), devices)
    groups = layout.num_shards(layout.mesh_axes("batch"))
    length = load.prompt + load.answer
    sizes = generation.rounded(config, groups, load.prompt, load.patches, length)
    prefill = generation.plan(config, asked, topology, sizes, "prefill", load.image, template)
    width = -(-length // PAGE_SIZE)
    page_bytes = prefill.compiled.memory.cache / (width + 1)
    pages = min(_room(one, page_bytes) for one in (prefill.compiled, prefill.encode) if one) if prefill.fits else 0
    slots = _slots(load, groups, pages, width)
    decode = None
    if slots:
        half = generation.rounded(config, slots, 1, 0, load.prompt + load.answer // 2)
        decode = generation.plan(config, asked, topology, half, "decode", load.image, template)
    return ServingPlan(topology, load, groups, prefill, decode, page_bytes, pages, slots)


def _room(compiled: Compiled, page_bytes: float) -> int:
    """Return the pages of a group that fit beside all else that a program needs."""
    return int((compiled.limit - (compiled.memory.peak - compiled.memory.cache)) // page_bytes)


def _slots(load: Load, groups: int, pages: int, width: int) -> int:
    """Return how many answers have their pages at once."""
    return groups * min((pages - 1) // width, -(-load.slots // groups)) if pages > width else 0

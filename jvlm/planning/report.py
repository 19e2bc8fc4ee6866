"""A plan, and what it says of itself."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jvlm.training.config import Experiment

from .chips import GIB, Topology
from .program import Compiled
from .roofline import Bound

What = Literal["train", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step of an experiment on one topology.

    Attributes:
      bound: None where it does not fit.
      opening: after a prefill, the step that gives its cache the places of the answers.
    """

    topology: Topology
    compiled: Compiled
    bound: Bound | None
    what: What = "train"
    opening: Compiled | None = None

    @property
    def fits(self) -> bool:
        return self.compiled.fits and (self.opening is None or self.opening.fits)

    def values(self) -> dict:
        """For JSON; bytes, FLOP and seconds."""
        wires = [{**dataclasses.asdict(w), "bytes": w.bytes, "seconds": w.seconds} for w in self.compiled.wires]
        found = {
            "what": self.what,
            "topology": self.topology.name,
            "chips": self.topology.chips,
            **dataclasses.asdict(self.compiled),
            "wires": wires,
            "peak": self.compiled.memory.peak,
            "compile_seconds": self.compiled.seconds,
        }
        if self.opening:
            memory = self.opening.memory
            found["opening"] = {**dataclasses.asdict(memory), "peak": memory.peak, "fits": self.opening.fits}
        if self.bound:
            names = ("overlapped", "serial", "limited_by")
            found["bound"] = {**dataclasses.asdict(self.bound), **{n: getattr(self.bound, n) for n in names}}
        return found

    def text(self, experiment: Experiment, price: float | None) -> str:
        """Markdown."""
        compiled, topology = self.compiled, self.topology
        mesh = ", ".join(f"{axis} {size}" for axis, size in compiled.mesh.items()) or "one device"
        lines = [f"## {topology.name}: {topology.chips} chips, {mesh}", "", f"- memory of a chip: {_memory(compiled)}"]
        if self.opening:
            lines.append(f"- while the cache is given places for the answers: {_memory(self.opening)}")
        if self.bound is None:
            return "\n".join([*lines, f"- compiled in {compiled.seconds:.0f} s", ""])
        lines += [*self._roofline(self.bound)]
        lines += self._budget(experiment, price) if self.what == "train" else self._cost(price)
        return "\n".join([*lines, *self._wires(), "", f"Compiled and read in {compiled.seconds:.0f} s.", ""])

    def _roofline(self, best: Bound) -> list[str]:
        total = sum(best.arithmetic.values())
        shares = ", ".join(f"{part} {100 * flop / total:.1f} %" for part, flop in best.arithmetic.items())
        again = ", recomputation included" if self.what == "train" else ""
        lines = [
            f"- arithmetic of a step: {_amount(total)}FLOP ({shares}); a chip executes {_amount(best.executed)}FLOP "
            f"of it{again}",
            f"- a step takes at least {_time(best.overlapped)}: compute {_time(best.compute)}, memory "
            f"{_time(best.hbm)}, network {_time(best.network)}; {_time(best.serial)} if nothing overlapped",
        ]
        limits = f"limited by {best.limited_by}"
        if self.what == "decode":
            rate = f"{best.tokens_per_second:,.0f} tokens a second, {1 / best.overlapped:,.1f} for each sequence"
            moved = f"{_amount(self.compiled.hbm)}B of its memory"
            return [*lines, f"- **at most {rate}** ({limits}: a chip reads and writes {moved} for a token of each)"]
        rate = f"{best.tokens_per_second:,.0f} tokens and {best.images_per_second:,.1f} images a second"
        mfu = f"**MFU at most {100 * best.mfu:.1f} %** ({limits}; {100 * best.mfu_serial:.1f} % without overlap)"
        return [*lines, f"- {mfu}, {rate}"]

    def _budget(self, experiment: Experiment, price: float | None) -> list[str]:
        """What all of the experiment's steps take and cost at the bound."""
        if experiment.steps is None:
            return []
        seconds = experiment.steps * self.bound.overlapped
        hours = seconds / 3600 * self.topology.chips
        tokens = experiment.steps * self.bound.tokens
        time = f"{hours:,.0f} chip-hours, {seconds / 86400:.1f} days"
        line = f"- {experiment.steps:,} steps, {tokens / 1e9:,.1f} G tokens: at least {time}"
        return [line + (f", {hours * price:,.0f} at {price} a chip-hour" if price else "")]

    def _cost(self, price: float | None) -> list[str]:
        if not price:
            return []
        cost = price * self.topology.chips / 3600 / self.bound.tokens_per_second * 1e6
        return [f"- a million tokens: at least {cost:,.2f} at {price} a chip-hour"]

    def _wires(self) -> list[str]:
        wires = self.compiled.wires
        if not wires:
            return []
        kinds = sorted({kind for wire in wires for kind in wire.kinds})
        head = f"| {'GB' if self.what == 'train' else 'MB'} a chip sends over | {' | '.join(kinds)} | GB/s | s |"
        lines = ["", head, "| --- |" + " ---: |" * (len(kinds) + 2)]
        unit = 1e9 if self.what == "train" else 1e6
        for wire in wires:
            sizes = " | ".join(f"{wire.kinds.get(kind, 0) / unit:.2f}" for kind in kinds)
            network = " (data centre)" if wire.network == "dcn" else ""
            lines.append(f"| {wire.axes}{network} | {sizes} | {wire.bandwidth / 1e9:.0f} | {wire.seconds:.4f} |")
        return lines


def _memory(compiled: Compiled) -> str:
    parts = dataclasses.asdict(compiled.memory)
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size or name == "temporary")
    verdict = "fits" if compiled.fits else "DOES NOT FIT"
    return f"{compiled.memory.peak / GIB:.2f} of {compiled.limit / GIB:.2f} GiB, **{verdict}** ({shown})"


def _amount(value: float) -> str:
    """Three digits and a prefix."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}" if value < 1000 * size else f"{value / size:,.0f} {prefix}"
    return f"{value:.3g} "


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"

"""A plan, and what it says of itself."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jvlm.training.config import Experiment
from jvlm.units import GIB

from .chips import Topology
from .measure import Compiled
from .roofline import Roofline

StepKind = Literal["train", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step of an experiment on one topology.

    Attributes:
      roofline: None where it does not fit, or a program's text could not be read.
      encode: of a prefill, the vision tower's pass over its pictures, which goes before.
    """

    topology: Topology
    compiled: Compiled
    roofline: Roofline | None
    step: StepKind = "train"
    encode: Compiled | None = None

    @property
    def fits(self) -> bool:
        return self.compiled.fits and (self.encode is None or self.encode.fits)

    def values(self) -> dict:
        """For JSON; bytes, FLOP and seconds."""
        axis_traffic = [
            {**dataclasses.asdict(w), "bytes": w.bytes, "seconds": w.seconds} for w in self.compiled.axis_traffic
        ]
        result = {
            "step": self.step,
            "topology": self.topology.name,
            "chips": self.topology.chips,
            **dataclasses.asdict(self.compiled),
            "axis_traffic": axis_traffic,
            "peak": self.compiled.memory.peak,
            "compile_seconds": self.compiled.seconds,
        }
        if self.encode:
            memory = self.encode.memory
            result["encode"] = {**dataclasses.asdict(memory), "peak": memory.peak, "fits": self.encode.fits}
        if self.roofline:
            names = ("overlapped", "serial", "limited_by")
            result["roofline"] = {**dataclasses.asdict(self.roofline), **{n: getattr(self.roofline, n) for n in names}}
        return result

    def text(self, experiment: Experiment, price: float | None) -> str:
        """Markdown."""
        compiled, topology = self.compiled, self.topology
        mesh = ", ".join(f"{axis} {size}" for axis, size in compiled.mesh.items()) or "one device"
        lines = [f"## {topology.name}: {topology.chips} chips, {mesh}", "", f"- memory of a chip: {_memory(compiled)}"]
        if self.encode:
            lines.append(f"- while pictures are encoded: {_memory(self.encode)}")
        if self.roofline is None:
            lines += [f"- {line}" for line in self._unread()]
            return "\n".join([*lines, f"- compiled in {compiled.seconds:.0f} s by {compiled.compiler}", ""])
        lines += [*self._roofline(self.roofline)]
        lines += self._budget(experiment, price) if self.step == "train" else self._cost(price)
        done = f"Compiled and read in {compiled.seconds:.0f} s by {compiled.compiler}."
        return "\n".join([*lines, *self._traffic_table(), "", done, ""])

    def _unread(self) -> list[str]:
        """Return why nothing but memory is told, for a plan that fits."""
        reasons = dict.fromkeys(one.unread for one in (self.compiled, self.encode) if one is not None and one.unread)
        return [
            f"no bound of its speed, no traffic, and activations counted as temporary: jaxlib cannot print what this "
            f"compiler made ({reason[:200]}); use the compiler that jax asks for"
            for reason in reasons
        ]

    def _roofline(self, best: Roofline) -> list[str]:
        total = sum(best.arithmetic.values())
        shares = ", ".join(f"{part} {100 * flop / total:.1f} %" for part, flop in best.arithmetic.items())
        again = ", recomputation included" if self.step == "train" else ""
        lines = [
            f"- arithmetic of a step: {_amount(total)}FLOP ({shares}); a chip executes {_amount(best.executed)}FLOP "
            f"of it{again}",
            f"- a step takes at least {_time(best.overlapped)}: compute {_time(best.compute)}, memory "
            f"{_time(best.hbm)}, network {_time(best.network)}; {_time(best.serial)} if nothing overlapped",
        ]
        limits = f"limited by {best.limited_by}"
        if self.step == "decode":
            rate = f"{best.tokens_per_second:,.0f} tokens a second, {1 / best.overlapped:,.1f} for each sequence"
            moved = f"{_amount(self.compiled.hbm)}B of its memory"
            return [*lines, f"- **at most {rate}** ({limits}: a chip reads and writes {moved} for a token of each)"]
        rate = f"{best.tokens_per_second:,.0f} tokens and {best.images_per_second:,.1f} images a second"
        mfu = f"**MFU at most {100 * best.mfu:.1f} %** ({limits}; {100 * best.mfu_serial:.1f} % without overlap)"
        return [*lines, f"- {mfu}, {rate}"]

    def _budget(self, experiment: Experiment, price: float | None) -> list[str]:
        """Return what all of the experiment's steps take and cost at the bound."""
        if experiment.steps is None:
            return []
        seconds = experiment.steps * self.roofline.overlapped
        hours = seconds / 3600 * self.topology.chips
        tokens = experiment.steps * self.roofline.tokens
        time = f"{hours:,.0f} chip-hours, {seconds / 86400:.1f} days"
        line = f"- {experiment.steps:,} steps, {tokens / 1e9:,.1f} G tokens: at least {time}"
        return [line + (f", {hours * price:,.0f} at {price} a chip-hour" if price else "")]

    def _cost(self, price: float | None) -> list[str]:
        if not price:
            return []
        cost = price * self.topology.chips / 3600 / self.roofline.tokens_per_second * 1e6
        return [f"- a million tokens: at least {cost:,.2f} at {price} a chip-hour"]

    def _traffic_table(self) -> list[str]:
        axis_traffic = self.compiled.axis_traffic
        if not axis_traffic:
            return []
        kinds = sorted({kind for one in axis_traffic for kind in one.kinds})
        head = f"| {'GB' if self.step == 'train' else 'MB'} a chip sends over | {' | '.join(kinds)} | GB/s | s |"
        lines = ["", head, "| --- |" + " ---: |" * (len(kinds) + 2)]
        unit = 1e9 if self.step == "train" else 1e6
        for one in axis_traffic:
            sizes = " | ".join(f"{one.kinds.get(kind, 0) / unit:.2f}" for kind in kinds)
            network = " (data centre)" if one.network == "dcn" else ""
            lines.append(f"| {one.axes}{network} | {sizes} | {one.bandwidth / 1e9:.0f} | {one.seconds:.4f} |")
        return lines


def _memory(compiled: Compiled) -> str:
    parts = dataclasses.asdict(compiled.memory)
    names = {"parameters": "base"} if compiled.memory.adapters else {}
    shown = ", ".join(
        f"{names.get(name, name)} {size / GIB:.2f}" for name, size in parts.items() if size or name == "temporary"
    )
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

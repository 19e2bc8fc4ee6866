"""Try neighbours of a plan, as many as the time allows: fewer chips, other settings, larger batches."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jvlm.errors import UserError
from jvlm.parallel import rules
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training.config import Experiment
from jvlm.units import GIB

from .chips import smaller

REMAT = ("none", "dots", "attention", "full")
TABLES = ("standard", "store_over_context", "replicated")  # those for training


def search(plan: Callable, experiment: Experiment, first: Any, lengths: Any, seconds: float) -> str:
    """Return what was tried around a plan, as Markdown, and the best of it.

    Args:
      plan: (experiment, topology, lengths) -> a plan with ``topology``, ``compiled`` and ``bound``.
      seconds: no new compilation begins after; at least one is tried.

    Raises:
      UserError: the first plan's program could not be read, so that nothing can be compared with it.
    """
    if first.compiled.unread:
        raise UserError(f"--suggest compares bounds, and {first.compiled.compiler} makes programs that cannot be read")
    ends = time.monotonic() + seconds
    tried = [("as it is", experiment, first)]
    lines = [_row("as it is", first)]
    for what, changed, topology in _candidates(experiment, first, tried):
        if len(tried) > 1 and time.monotonic() > ends:
            lines.append("| (out of time) | | | |")
            break
        try:
            candidate = plan(changed, topology, lengths)
        except UserError as error:
            lines.append(f"| {what} | {str(error).splitlines()[0][:80]} | | |")
            continue
        tried.append((what, changed, candidate))
        lines.append(_row(what, candidate))
    fitting = [t for t in tried if t[2].compiled.readable]
    head = ["| tried | GiB of a chip | MFU at most | tokens/s at most |", "| --- | ---: | ---: | ---: |"]
    return "\n".join([*head, *lines, "", *_verdicts(first, fitting), ""])


def _candidates(experiment: Experiment, first: Any, tried: list) -> Iterator[tuple[str, Experiment, Any]]:
    """Yield what to try next, given what was found so far."""
    here = first.topology
    precision = experiment.model.precision
    for policy in REMAT:
        if policy != precision.remat:
            changed = dataclasses.replace(precision, remat=policy)
            model = dataclasses.replace(experiment.model, precision=changed)
            yield f"remat {policy}", dataclasses.replace(experiment, model=model), here
    seen = [_effective(experiment.parallel, first.compiled.mesh)]
    for table in TABLES:
        parallel = dataclasses.replace(experiment.parallel, rules=table)
        effective = _effective(parallel, first.compiled.mesh)
        if effective not in seen:
            seen.append(effective)
            yield f"rules {table}", dataclasses.replace(experiment, parallel=parallel), here
    sequences = experiment.data.batch_size
    while tried[-1][2].compiled.fits or sequences == experiment.data.batch_size:
        if not first.compiled.fits:
            break
        sequences *= 2
        data = dataclasses.replace(experiment.data, batch_size=sequences)
        yield f"{sequences} sequences", dataclasses.replace(experiment, data=data), here
        if not tried[-1][2].compiled.fits:
            break
    topology = smaller(here) if first.compiled.fits else None
    while topology is not None:
        yield f"on {topology.name}", experiment, topology
        if not tried[-1][2].compiled.fits:
            break
        topology = smaller(topology)


def _effective(parallel: ParallelConfig, mesh: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Return what a configuration's rules come to on a mesh of these axes; the others have one device."""
    lines = rules.table(parallel.rules, parallel.override)
    return {axis: tuple(name for name in names if name in mesh) for axis, names in lines.items()}


def _row(what: str, plan: Any) -> str:
    size = f"{plan.compiled.memory.peak / GIB:.1f} of {plan.compiled.limit / GIB:.1f}"
    if not plan.compiled.readable:
        return f"| {what} | {size}, {'cannot be read' if plan.compiled.fits else 'does not fit'} | | |"
    return f"| {what} | {size} | {100 * plan.roofline.mfu:.1f} % | {plan.roofline.tokens_per_second:,.0f} |"


def _verdicts(first: Any, fitting: list) -> list[str]:
    if not fitting:
        return ["Nothing that was tried fits."]
    here = [t for t in fitting if t[2].topology == first.topology]
    lines = []
    if here:
        fastest = max(here, key=lambda t: t[2].roofline.tokens_per_second)
        largest = max(here, key=lambda t: t[1].data.batch_size)
        lines.append(f"Fastest bound of what fits on {first.topology.name}: {fastest[0]}.")
        lines.append(f"Largest batch tried that fits: {largest[1].data.batch_size} sequences.")
    least = min(fitting, key=lambda t: t[2].topology.chips)
    lines.append(f"Smallest topology tried that fits: {least[2].topology.name}.")
    return [f"- {line}" for line in lines]

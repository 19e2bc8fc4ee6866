"""Compile an experiment's training step for TPU pods on this machine; say what it needs and how fast it may be.

    python tools/plan.py mimo_vl/stage4 --topology v5p:4x4x4 v6e:16x16 --price 4.2 --picture plan.png
    python tools/plan.py mimo_vl/stage4 --topology v5p:4x4x4 --suggest 20 -- --data.rows 64

No TPU is used: libtpu's compiler is (`pip install libtpu`, or PYTHONPATH=.venv/tpu-compiler after `make test`). Memory
is the compiler's. Times are bounds from the chips' data sheets: nothing was measured, and no run will be faster.
docs/plan.md says what each figure is and is not. What follows -- are fields of the experiment.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

# The compiler asks for a machine's description before it is told a topology; these say that there is none. The last
# lets two plans run at a time: neither holds a TPU.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-8",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

from planning import listing, picture, suggest
from planning.chips import GIB, Topology
from planning.program import Compiled, compile_step
from planning.roofline import Bound, Load, bound

from jvlm.cli import load_experiment
from jvlm.training.config import Experiment
from jvlm.training.program import abstract_batches


@dataclasses.dataclass(frozen=True)
class Plan:
    """One experiment on one topology."""

    topology: Topology
    compiled: Compiled
    bound: Bound | None

    def values(self) -> dict:
        """For JSON; bytes, FLOP and seconds."""
        wires = [{**dataclasses.asdict(w), "bytes": w.bytes, "seconds": w.seconds} for w in self.compiled.wires]
        found = {
            "topology": self.topology.name,
            "chips": self.topology.chips,
            **dataclasses.asdict(self.compiled),
            "wires": wires,
            "peak": self.compiled.memory.peak,
            "compile_seconds": self.compiled.seconds,
        }
        if self.bound:
            names = ("overlapped", "serial", "limited_by")
            found["bound"] = {**dataclasses.asdict(self.bound), **{n: getattr(self.bound, n) for n in names}}
        return found


def prepare(config: str, fields: list[str]) -> Experiment:
    """An experiment with all that planning needs. Raises ValueError for what it lacks."""
    experiment = load_experiment(config, fields)
    if experiment.model is None:
        raise ValueError(f"{config} takes its model from {experiment.init_from}; planning needs `model` in the config")
    return dataclasses.replace(experiment, stages=())


def assumed_load(experiment: Experiment, conversation: int | None, image: int | None) -> Load:
    """What fills the rows, unless it is given: the longest conversations and the largest images that may be."""
    data = experiment.data
    largest = abstract_batches(experiment).max_frame_patches or data.row_patches
    return Load(conversation or data.max_length or data.row_tokens, image or largest)


def plan(experiment: Experiment, topology: Topology, load: Load) -> Plan:
    """Compile and judge."""
    compiled = compile_step(experiment, topology)
    return Plan(topology, compiled, bound(experiment, compiled, topology, load) if compiled.fits else None)


def report(plan: Plan, experiment: Experiment, price: float | None) -> str:
    """A plan as Markdown."""
    compiled, topology = plan.compiled, plan.topology
    mesh = ", ".join(f"{axis} {size}" for axis, size in compiled.mesh.items()) or "one device"
    memory = ", ".join(f"{name} {size / GIB:.2f}" for name, size in dataclasses.asdict(compiled.memory).items())
    verdict = "fits" if compiled.fits else "DOES NOT FIT"
    lines = [
        f"## {topology.name}: {topology.chips} chips, {mesh}",
        "",
        f"- memory of a chip: {compiled.memory.peak / GIB:.2f} of {compiled.limit / GIB:.2f} GiB, **{verdict}** "
        f"({memory})",
    ]
    best = plan.bound
    if best is None:
        return "\n".join([*lines, f"- compiled in {compiled.seconds:.0f} s", ""])
    total = sum(best.arithmetic.values())
    shares = ", ".join(f"{part} {100 * flop / total:.1f} %" for part, flop in best.arithmetic.items())
    lines += [
        f"- arithmetic of a step: {total / 1e15:.1f} PFLOP ({shares}); a chip executes "
        f"{best.executed / 1e12:.0f} TFLOP of it, recomputation included",
        f"- a step takes at least {best.overlapped:.2f} s: compute {best.compute:.2f}, memory {best.hbm:.2f}, network "
        f"{best.network:.2f} s; {best.serial:.2f} s if nothing overlapped",
        f"- **MFU at most {100 * best.mfu:.1f} %** (limited by {best.limited_by}; {100 * best.mfu_serial:.1f} % "
        f"without overlap), {best.tokens_per_second:,.0f} tokens and {best.images_per_second:,.1f} images a second",
    ]
    lines += budget(plan, experiment, price)
    if compiled.wires:
        kinds = sorted({kind for wire in compiled.wires for kind in wire.kinds})
        lines += [
            "",
            f"| GB a chip sends over | {' | '.join(kinds)} | GB/s | s |",
            "| --- |" + " ---: |" * (len(kinds) + 2),
        ]
        for wire in compiled.wires:
            sizes = " | ".join(f"{wire.kinds.get(kind, 0) / 1e9:.2f}" for kind in kinds)
            network = "" if wire.network == "ici" else " (data centre)"
            lines.append(f"| {wire.axes}{network} | {sizes} | {wire.bandwidth / 1e9:.0f} | {wire.seconds:.3f} |")
    return "\n".join([*lines, "", f"Compiled and read in {compiled.seconds:.0f} s.", ""])


def budget(plan: Plan, experiment: Experiment, price: float | None) -> list[str]:
    """What all of the experiment's steps take and cost at the bound."""
    if experiment.steps is None:
        return []
    seconds = experiment.steps * plan.bound.overlapped
    hours = seconds / 3600 * plan.topology.chips
    tokens = experiment.steps * plan.bound.tokens
    time = f"{hours:,.0f} chip-hours, {seconds / 86400:.1f} days"
    line = f"- {experiment.steps:,} steps, {tokens / 1e9:,.1f} G tokens: at least {time}"
    return [line + (f", {hours * price:,.0f} at {price} a chip-hour" if price else "")]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = _parser().parse_args(argv[:cut])
    try:
        return _run(arguments, argv[cut + 1 :])
    except (ValueError, FileNotFoundError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, fields: list[str]) -> int:
    experiment = prepare(arguments.config, fields)
    names = arguments.topology or experiment.topologies
    if not names:
        raise ValueError(f"{arguments.config} names no topologies; give --topology v5p:4x4x4")
    load = assumed_load(experiment, arguments.conversation, arguments.image)
    data = experiment.data
    print(
        f"# {experiment.name}: {experiment.accumulation} x {data.rows} rows of {data.row_tokens} tokens and "
        f"{data.row_patches} patches\n\nAssumed: full rows, conversations of {load.conversation} tokens, images of "
        f"{load.image} patches.\n"
    )
    plans, changed = [], False
    for name in names:
        plans.append(plan(experiment, Topology.parse(name), load))
        print(report(plans[-1], experiment, arguments.price), flush=True)
        if arguments.collectives and plans[-1].compiled.fits:
            changed |= _collectives(plans[-1], experiment.name, Path(arguments.collectives), arguments.update)
        if arguments.suggest:
            print(suggest.search(plan, experiment, plans[-1], load, 60 * arguments.suggest), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([p.values() for p in plans], indent=2) + "\n")
    if arguments.picture:
        bars = [(p.topology.name, p.compiled) for p in plans]
        picture.draw(Path(arguments.picture), f"{experiment.name}: memory of a chip, training", bars)
    return 0 if all(p.compiled.fits for p in plans) and not changed else 1


def _collectives(plan: Plan, name: str, folder: Path, update: bool) -> bool:
    """Compare with the file in the folder, or write it; returns whether they differ."""
    path = listing.path_of(folder, name, plan.topology)
    if update:
        path.write_text(listing.text(plan.compiled))
        print(f"wrote {path}\n")
        return False
    difference = listing.difference(path, plan.compiled)
    if difference:
        print(f"Collectives have changed; if this is meant, run again with --update:\n\n{difference}")
    return bool(difference)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a Python file with get_config(), or its name under configs/")
    parser.add_argument("--topology", nargs="+", help="such as v5p:4x4x4 or v6e:16x16*2 (default: the config's)")
    parser.add_argument("--conversation", type=int, help="tokens of a conversation (default: the longest there may be)")
    parser.add_argument("--image", type=int, help="patches of an image (default: the most there may be)")
    parser.add_argument("--price", type=float, help="of a chip-hour")
    parser.add_argument("--suggest", type=float, metavar="MINUTES", help="try other topologies, settings and batches")
    parser.add_argument("--collectives", metavar="FOLDER", help="compare with the list of collectives in this folder")
    parser.add_argument("--update", action="store_true", help="write that list instead")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--picture", help="PNG to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Compile an experiment's steps for TPU pods or GPUs on this machine; say what they need and how fast they may be.

    python tools/plan.py mimo_vl/stage4 --topology v5p:4x4x4 v6e:16x16 --price 4.2 --picture plan.png
    python tools/plan.py mimo_vl/stage4 --topology h200:8x8 --network 25
    python tools/plan.py mimo_vl/stage4 --topology v5p:4x4x4 --suggest 20 -- --data.rows 64
    python tools/plan.py mimo_vl/stage4 --what decode --topology v5e:2x4 --rows 64 --places 8192
    python tools/plan.py mimo_vl/stage4 --what prefill --topology v5e:2x4 --rows 1 --prompt 32768 --patches 65536

No TPU is used: libtpu's compiler is (`pip install libtpu`, or PYTHONPATH=.venv/tpu-compiler after `make test`). Nor are
GPUs, h200:8x8 for eight machines of eight: there it is XLA's own compiler (PYTHONPATH=.venv/gpu-compiler). Memory is
the compiler's. Times are bounds from the chips' data sheets: nothing was measured, and no run will be faster.
docs/plan.md says what each figure is and is not. What follows -- are fields of the experiment.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from jvlm.planning.environment import WITHOUT_A_GPU, WITHOUT_A_TPU

os.environ.update(WITHOUT_A_TPU | WITHOUT_A_GPU)

from jvlm import configs
from jvlm.inference.program import Sizes
from jvlm.planning import generation, listing, picture, suggest
from jvlm.planning.chips import Topology
from jvlm.planning.program import compile_step
from jvlm.planning.report import Plan
from jvlm.planning.roofline import Load, bound
from jvlm.training.compiled_step import abstract_batches
from jvlm.training.config import Experiment


def prepare(config: str, fields: list[str], what: str = "train") -> Experiment:
    """An experiment with all that planning needs. Raises ValueError for what it lacks."""
    experiment = configs.load(config, fields) if what == "train" else configs.load(config, fields, generation.served)
    if experiment.model is None:
        raise ValueError(f"{config} takes its model from {experiment.init_from}; planning needs `model` in the config")
    return dataclasses.replace(experiment, stages=())


def assumed_load(experiment: Experiment, conversation: int | None, image: int | None) -> Load:
    """What fills the rows, unless it is given: the longest conversations and the largest images that may be."""
    data = experiment.data
    largest = abstract_batches(experiment).max_frame_patches or data.row_patches
    return Load(conversation or data.max_length or data.row_tokens, image or largest)


def plan(experiment: Experiment, topology: Topology, load: Load) -> Plan:
    """Compile the training step, and judge."""
    compiled = compile_step(experiment, topology)
    return Plan(topology, compiled, bound(experiment, compiled, topology, load) if compiled.fits else None)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = _parser().parse_args(argv[:cut])
    try:
        return _run(arguments, argv[cut + 1 :])
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, fields: list[str]) -> int:
    what = arguments.what
    if arguments.suggest and what != "train":
        raise ValueError(f"--suggest looks for better training steps; it cannot be given with --what {what}")
    experiment = prepare(arguments.config, fields, what)
    names = arguments.topology or experiment.topologies
    if not names:
        raise ValueError(f"{arguments.config} names no topologies; give --topology v5p:4x4x4")
    load = assumed_load(experiment, arguments.conversation, arguments.image)
    if what == "train":
        print(_training_header(experiment, load))
    else:
        sizes = _sizes(arguments, experiment)
        asked = experiment.parallel if any(f.startswith("--parallel") for f in fields) else None
        print(_generation_header(experiment, what, sizes, load))
    plans, changed = [], False
    for name in names:
        topology = Topology.parse(name, None if arguments.network is None else 1e9 * arguments.network)
        if what == "train":
            found = plan(experiment, topology, load)
        else:
            found = generation.plan(experiment.model, asked, topology, sizes, what, load.image)
        plans.append(found)
        print(found.text(experiment, arguments.price), flush=True)
        if arguments.collectives and found.compiled.fits:
            step = experiment.name if what == "train" else f"{experiment.name}_{what}"
            changed |= _collectives(found, step, Path(arguments.collectives), arguments.update)
        if arguments.suggest:
            print(suggest.search(plan, experiment, found, load, 60 * arguments.suggest), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([p.values() for p in plans], indent=2) + "\n")
    if arguments.picture:
        bars = [(p.topology.name, p.compiled) for p in plans]
        step = "training" if what == "train" else what
        picture.draw(Path(arguments.picture), f"{experiment.name}: memory of a chip, {step}", bars)
    return 0 if all(p.fits for p in plans) and not changed else 1


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


def _sizes(arguments: argparse.Namespace, experiment: Experiment) -> Sizes:
    data = experiment.data
    prompt = data.row_tokens if arguments.prompt is None else arguments.prompt
    if arguments.what == "decode" and arguments.prompt is None:
        prompt = 1  # a step of decoding sees the cache alone
    patches = data.row_patches if arguments.patches is None else arguments.patches
    places = arguments.places or (arguments.prompt or data.row_tokens)
    return generation.rounded(experiment.model, arguments.rows, prompt, patches, places)


def _training_header(experiment: Experiment, load: Load) -> str:
    data = experiment.data
    return (
        f"# {experiment.name}: {experiment.gradient_accumulation_steps} x {data.rows} rows of {data.row_tokens} "
        f"tokens and {data.row_patches} patches\n\nAssumed: full rows, conversations of {load.conversation} tokens, "
        f"images of {load.image} patches.\n"
    )


def _generation_header(experiment: Experiment, what: str, sizes: Sizes, load: Load) -> str:
    precision = experiment.model.precision
    kept = f"parameters in {precision.param_dtype}, products in {precision.compute_dtype}"
    if what == "decode":
        return (
            f"# {experiment.name}: one token for each of {sizes.rows} sequences, a cache of {sizes.places} places\n\n"
            f"Assumed: the cache is full; {kept}.\n"
        )
    return (
        f"# {experiment.name}: {sizes.rows} prompts of {sizes.tokens} tokens and {sizes.patches} patches, then a cache "
        f"of {sizes.places} places\n\nAssumed: full prompts, images of {load.image} patches; {kept}.\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a Python file with get_config(), or its name under configs/")
    parser.add_argument("--what", choices=("train", "prefill", "decode"), default="train", help="the step to compile")
    parser.add_argument("--topology", nargs="+", help="v5p:4x4x4, v6e:16x16*2, h200:8x8 (default: the config's)")
    parser.add_argument("--network", type=float, metavar="GB/S", help="of a chip between machines of GPUs, or slices")
    parser.add_argument("--conversation", type=int, help="tokens of a conversation (default: the longest there may be)")
    parser.add_argument("--image", type=int, help="patches of an image (default: the most there may be)")
    parser.add_argument("--rows", type=int, default=8, help="prefill, decode: sequences that run together")
    parser.add_argument("--prompt", type=int, help="prefill: tokens of a prompt (default: the config's row)")
    parser.add_argument("--patches", type=int, help="prefill: patches of a prompt (default: the config's row)")
    parser.add_argument("--places", type=int, help="prefill, decode: of the cache (default: the prompt's tokens)")
    parser.add_argument("--price", type=float, help="of a chip-hour")
    parser.add_argument("--suggest", type=float, metavar="MINUTES", help="try other topologies, settings and batches")
    parser.add_argument("--collectives", metavar="FOLDER", help="compare with the list of collectives in this folder")
    parser.add_argument("--update", action="store_true", help="write that list instead")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--picture", help="PNG to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())

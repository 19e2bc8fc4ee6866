"""What every fine-tuning recipe needs of the chips that it names: docs/results/finetune_memory.md, from the compilers.

    make plan-finetune
    make plan-finetune ARGS="--only qwen2_5_vl_7b_qlora --again"

Each recipe of configs/finetune is compiled by `jvlm plan` for its topologies, one process at a time: minutes and GBs
of memory each. Rows are written to docs/results/finetune_memory.json as they are made. Those that are there, of recipes
that have the same settings as then, are not made again; so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from jvlm import configs
from jvlm.planning.chips import Topology
from jvlm.planning.environment import WITHOUT_A_GPU, WITHOUT_A_TPU
from jvlm.planning.measure import GPU_SHARE, GPU_SHARE_VARIABLE
from jvlm.training.config import Experiment
from jvlm.training.recipes import Recipe
from jvlm.units import GIB

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "docs" / "results" / "finetune_memory.json"
TABLE = ROWS.with_suffix(".md")
BEGIN, END = "<!-- table of tools/plan_finetune.py -->", "<!-- end of the table -->"
# Beside what recipes name: adapters and quantised kernels split over several chips, each with a sequence at a time.
SPLIT = {"qwen2_5_vl_7b_lora": ("l4:4",), "qwen2_5_vl_7b_qlora": ("l4:4",)}
SHARE = 0.9  # of a GPU's memory that programs may have in these plans


def recipes() -> dict[str, Experiment]:
    """Return name -> recipe, of those that `jvlm.training.recipes` makes."""
    names = [path.stem for path in sorted((ROOT / "configs" / "finetune").glob("*.py"))]
    return {name: configs.load(f"finetune/{name}", []) for name in names if name.rpartition("_")[2] in get_args(Recipe)}


def settings(experiment: Experiment) -> dict[str, Any]:
    """Return what of a recipe its memory depends on."""
    model, data, adapter, quantize = experiment.model, experiment.data, experiment.adapter, experiment.quantize
    chosen = {
        "seq_len": data.seq_len,
        "max_patches": data.max_patches,
        "batch_size": data.batch_size,
        "gradient_accumulation_steps": experiment.gradient_accumulation_steps,
        "remat": model.precision.remat,
        "param_dtype": model.precision.param_dtype,
        "adapter": adapter and dataclasses.asdict(adapter),
        "quantize": quantize and dataclasses.asdict(quantize),
        "optimizer": experiment.optimizer.kind,
        "parallel": {"fsdp": experiment.parallel.fsdp, "tensor": experiment.parallel.tensor},
    }
    return json.loads(json.dumps(chosen))  # lists for tuples, as the rows have them


def plan(name: str, topology: str) -> dict[str, Any]:
    """Return what `jvlm plan` says of a recipe on a topology, and what it took to find out.

    Raises:
      RuntimeError: no plan came of it; with the end of its messages.
    """
    beside = [str(Path(sys.prefix) / folder) for folder in ("tpu-compiler", "gpu-compiler")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *beside])
    env = {**os.environ, **WITHOUT_A_TPU, **WITHOUT_A_GPU, "PYTHONPATH": path, GPU_SHARE_VARIABLE: str(SHARE)}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "plan.json"
        command = [sys.executable, "tools/plan.py", f"finetune/{name}", "--topology", topology, "--json", str(written)]
        if topology in SPLIT.get(name, ()):
            chips = Topology.parse(topology).chips
            command += ["--data.batch_size", str(chips), "--gradient_accumulation_steps", str(16 // chips)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if not written.is_file():
            raise RuntimeError(f"finetune/{name} on {topology}: {done.stderr[-2000:]}")
        (found,) = json.loads(written.read_text())
    chosen = {key: found[key] for key in ("chips", "mesh", "memory", "peak", "limit", "fits")}
    if "roofline" in found:
        names = ("tokens_per_second", "mfu", "limited_by", "compute", "hbm", "network")
        chosen["roofline"] = {key: found["roofline"][key] for key in names}
    return {
        **chosen,
        "seconds": round(time.monotonic() - began),
        "resident": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,  # the largest process so far
    }


def table(rows: dict[str, dict]) -> str:
    """Return the rows as Markdown, ordered by recipe and topology."""
    lines = [
        "| recipe | chips | GiB of a chip at peak | of | fits | base | adapters | optimizer | activations | temporary "
        "| tokens/s at most |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key in sorted(rows):
        name, topology = key.split()
        row = rows[key]
        parts = [f"{row['memory'][part] / GIB:.2f}" for part in ("parameters", "adapters", "optimizer")]
        if "roofline" in row:
            parts += [f"{row['memory'][part] / GIB:.2f}" for part in ("activations", "temporary")]
            parts.append(f"{row['roofline']['tokens_per_second']:,.0f}")
        else:
            parts += ["", "", ""]
        peak = f"{row['peak'] / GIB:.2f}"
        lines.append(
            f"| {name} | {topology} | {peak} | {row['limit'] / GIB:.2f} | {verdict(row, topology)} | "
            f"{' | '.join(parts)} |"
        )
    return "\n".join(lines)


def verdict(row: dict, topology: str) -> str:
    """Return whether a program fits; on GPUs with how much of the memory JAX must be allowed."""
    if not row["fits"]:
        return "**no**"
    chip = Topology.parse(topology)
    if chip.switched and row["peak"] > GPU_SHARE * chip.chip.hbm:
        return f"with {SHARE}"
    return "yes"


def write(rows: dict[str, dict]) -> None:
    """Write the rows, and the table into its page."""
    ROWS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    page = TABLE.read_text()
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    TABLE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="recipes; all without")
    parser.add_argument("--topology", nargs="*", help="of those that recipes name, or of --only; all without")
    parser.add_argument("--again", action="store_true", help="make rows that are there anew")
    parser.add_argument("--render", action="store_true", help="compile nothing: write the table from the rows")
    args = parser.parse_args()
    known = recipes()
    rows = json.loads(ROWS.read_text()) if ROWS.is_file() else {}
    wanted = {
        f"{name} {topology}": (name, topology)
        for name in known
        for topology in (*known[name].topologies, *SPLIT.get(name, ()))
    }
    if args.only and args.topology:  # chips that the recipe does not name
        wanted |= {f"{name} {topology}": (name, topology) for name in args.only for topology in args.topology}
    rows = {key: row for key, row in rows.items() if key.split()[0] in known}
    for key, (name, topology) in wanted.items():
        chosen = (not args.only or name in args.only) and (not args.topology or topology in args.topology)
        is_new = key not in rows or args.again or rows[key]["settings"] != settings(known[name])
        if args.render or not (chosen and is_new):
            continue
        rows[key] = {**plan(name, topology), "settings": settings(known[name])}
        row = rows[key]
        print(f"{key}: {row['peak'] / GIB:.2f} GiB, fits: {verdict(row, topology)}, {row['seconds']} s", flush=True)
        write(rows)
    write(rows)


if __name__ == "__main__":
    main()

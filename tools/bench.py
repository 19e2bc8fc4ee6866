"""jvlm against transformers + torch on this machine: the same weights, the same inputs, ratios within one run.

    make bench                                      # or: make bench ARGS="--only training --rounds 3"

A model of about 40 M parameters of the Qwen2.5-VL architecture, float32, with conversations of mixed lengths about
images of mixed sizes. Both sides run the same work: jvlm packs examples, torch gets left-padded batches, as its users
do, or one conversation at a time where that is faster for it. jvlm trains with ``remat="dots"``, which takes half the
memory of "none" here and a few percent less time. The two sides take turns; the ratio is the median of the
rounds' ratios. Parts of LoRA need PEFT (`.venv/export-peft` on PYTHONPATH).

Each run is added to docs/results/bench.jsonl. A ratio more than 10 % below that of earlier runs on such a machine is
printed in red.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import torch
import transformers

import jvlm
from jvlm import host_memory
from jvlm.models import vlm
from jvlm.models.layers import Precision
from tools import bench_generation, bench_model, bench_rounds, bench_training
from tools.bench_rounds import Result


def lora(name: str, *arguments, **limits) -> Result:
    """Return a result of tools/bench_lora.py, which needs PEFT."""
    from tools import bench_lora

    return bench_lora.measure(name, *arguments, **limits)


PARTS: dict[str, Callable[..., Result]] = {
    "training": bench_training.train,
    "lora": functools.partial(lora, "LoRA, all linear maps"),
    "lora-decoder": functools.partial(lora, "LoRA, language model"),
    "dora": functools.partial(lora, "DoRA, language model"),
    "prefill": bench_generation.prefill,
    "decode-1": functools.partial(bench_generation.decode, records=1),
    "decode-8": functools.partial(bench_generation.decode, records=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="at most so many of each part")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it; the parts share what is left")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time: for a machine with other work")
    parser.add_argument("--history", type=Path, default=bench_rounds.HISTORY, help="file that the results are added to")
    arguments = parser.parse_args()
    ends = time.perf_counter() + 60 * arguments.minutes
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    host_memory.keep_freed_memory()  # as `jvlm train` does; torch has it too
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    before, on = bench_rounds.read_history(arguments.history), bench_rounds.machine()
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    with tempfile.TemporaryDirectory() as folder:
        oracle = bench_model.make_checkpoint(Path(folder))
        model, processor = jvlm.load(folder, precision=Precision(compute_dtype="float32", remat="dots"))
        count = sum(vlm.parameter_counts(model).values())
        print(f"{count / 1e6:.1f} M parameters, float32, {on}, {', '.join(map(' '.join, versions.items()))}")
        print(bench_rounds.HEADER, flush=True)
        for number, name in enumerate(arguments.only):
            share = (ends - time.perf_counter()) / (len(arguments.only) - number)
            limits = {"seconds": share, "rounds": arguments.rounds}
            result = PARTS[name](model, processor, oracle, clock=clock, **limits)
            stored = bench_rounds.stored_ratio(before, result.name, on)
            print(bench_rounds.line(result, stored, colour=colour), flush=True)
            bench_rounds.append_history([result], versions, arguments.history)


if __name__ == "__main__":
    main()

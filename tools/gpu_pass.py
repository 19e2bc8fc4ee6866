"""Everything that needs a GPU, in one run of at most nine minutes: numerics, tuning, kernels, training, generation.

    make gpu-pass                                   # or: python tools/gpu_pass.py --output FOLDER
    make gpu-pass SMALL=1                           # the same on CPU in small: nothing is met for the first time there
    python tools/gpu_pass.py --parts numerics kernels

Each part is a process of its own, which finds the device's memory free, with a time limit. Its output goes to
``FOLDER/NAME.md`` as it is printed, so what has run counts even if the rest is cut off; ``FOLDER/README.md`` lists the
machine and how each part ended. The exit status is 1 if any part failed. jvlm and jvlm_kernels must be importable
(``PYTHONPATH=.:kernels`` where nothing can be installed).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Part:
    """One process: its module with options, seconds it may take, and what only it needs of the environment."""

    name: str
    command: tuple[str, ...]
    limit: int
    environment: tuple[tuple[str, str], ...] = ()


# gigabytes of a GPU -> (packed sequences, decoder layers of MiMo-VL-7B that fit in full training); LoRA trains all
_SEVEN = {80: (1, 8), 141: (2, 14)}
# as many patches as the images of 8,192 tokens have, so that both fill
_SHAPE = ("--preset", "mimo_vl_7b", "--patches", "12800", "--remat", "dots")
_THREE = ("--preset", "qwen2_5_vl_3b")
# torch and JAX in one process: JAX must not reserve the memory
_SHARED = (("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),)
_ALL = (("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95"),)
# kernels that run inside a CUDA graph leave no trace of their own, so a profile does without
_TRACED = (*_ALL, ("XLA_FLAGS", "--xla_gpu_enable_command_buffer="))
# numerics need no search for the fastest matrix product, which takes most of the compilation
_PLAIN = (("XLA_FLAGS", "--xla_gpu_autotune_level=0"),)
_TORCH = (("JAX_PLATFORMS", "cpu"), ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))


def parts_of(output: Path, small: bool) -> list[Part]:
    """Return the parts in order of worth: a run that is cut off has the first of them."""
    size = ("--small", "--steps", "2") if small else ()
    new = ("--new", "4") if small else ()
    lengths = ("256",) if small else ("8192",)
    rows, layers = map(str, _SEVEN[141 if gigabytes() > 100 else 80])
    seven = (*_SHAPE, "--rows", rows, "--layers", layers)
    lora = (*_SHAPE, "--rows", rows, "--layers", "36", "--params", "bfloat16", "--lora", "16")
    parts = [
        Part("numerics", ("tools.gpu.numerics",), 90, _PLAIN),
        Part("train-7b", ("tools.gpu.training", *seven, *size, "--profile"), 100, _TRACED),
        Part("train-7b-lora", ("tools.gpu.training", *lora, *size, "--profile"), 90, _TRACED),
        Part("kernels", ("tools.bench_kernels", "--lengths", *lengths, "--rounds", "5"), 110, _SHARED),
        Part("generate-3b", ("tools.gpu.generation", *_THREE, *size, *new), 150, _ALL),
        Part("serve-7b", ("tools.gpu.serving", "--preset", "qwen2_5_vl_7b", *size[:1]), 240, _ALL),
        Part("train-7b-torch", ("tools.gpu.torch_reference", "train", *seven, *size), 110, _TORCH),
        Part("generate-3b-torch", ("tools.gpu.torch_reference", "generate", *_THREE, *size, *new), 80, _TORCH),
        Part("tune", ("tools.tune_kernels", "--output", str(output / "tuned_cuda.json")), 110, _ALL),
        Part(
            "profile-decode",
            ("tools.gpu.generation", *_THREE, "--profile", "--batches", "1", *size, *new),
            120,
            _TRACED,
        ),
        Part("train-3b", ("tools.gpu.training", *_THREE, "--layers", "28", *size), 100, _ALL),
    ]
    if not small:
        return parts
    # tuning times a device's own kernels, of which a CPU has none; everything else is there, and slow
    return [dataclasses.replace(part, limit=10 * part.limit) for part in parts if part.name != "tune"]


def gigabytes() -> float:
    """Memory of the first GPU; 0 without one."""
    if not shutil.which("nvidia-smi"):
        return 0.0
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return float(found.splitlines()[0]) * 2**20 / 1e9


def machine() -> str:
    """Return the device, its driver, the processor and the versions that count, as Markdown lines."""
    lines = [f"- {datetime.date.today():%d %B %Y}, Python {platform.python_version()}, {os.cpu_count()} CPU cores"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        lines.append("- " + subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    names = "jax jaxlib jax-cuda13-pjrt flax torch triton transformers liger-kernel".split()
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return "\n".join([*lines, "- " + ", ".join(versions)])


def run(part: Part, output: Path, deadline: float) -> tuple[str, float]:
    """Run a part and print what it prints; return (how it ended, seconds)."""
    began = time.monotonic()
    limit = min(part.limit, deadline - began)
    if limit < min(20, part.limit):
        return "left out: no time", 0.0
    environment = os.environ | dict(part.environment) | {"PYTHONUNBUFFERED": "1"}
    with (output / f"{part.name}.md").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *part.command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        timer = threading.Timer(limit, process.kill)
        timer.start()
        for line in process.stdout:
            log.write(line)
            log.flush()
            print(line, end="", flush=True)
        status = process.wait()
        timed_out = not timer.is_alive()
        timer.cancel()
    seconds = time.monotonic() - began
    if timed_out:
        return f"cut off after {limit:.0f} s", seconds
    return ("done" if status == 0 else f"failed, status {status}"), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu-pass")
    parser.add_argument("--parts", nargs="+", help="only these, in this order")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it; ten times that with --small")
    parser.add_argument("--small", action="store_true", help="small models, on whatever device there is")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    known = {part.name: part for part in parts_of(arguments.output, arguments.small)}
    unknown = set(arguments.parts or ()) - set(known)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    deadline = time.monotonic() + 60 * arguments.minutes * (10 if arguments.small else 1)
    summary = f"# GPU pass\n\n{machine()}\n\n| part | seconds | ended |\n| --- | ---: | --- |\n"
    failed = 0
    for name in arguments.parts or known:
        print(f"\n## {name}\n", flush=True)
        ended, seconds = run(known[name], arguments.output, deadline)
        failed += ended != "done"
        summary += f"| {name} | {seconds:.0f} | {ended} |\n"
        (arguments.output / "README.md").write_text(summary)
    print(f"\n{summary}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Compile the cross-entropy of a vocabulary for TPUs and GPUs with the real compilers, on any machine.

    PYTHONPATH=.venv/tpu-compiler:.venv/gpu-compiler python tools/compile_losses.py v5e:2x2 v5p:2x2x1 a100 h200

It needs no TPU and no GPU, only the compilers, which `make test` installs into those folders. It prints a Markdown row
for each form of the loss, value and both gradients in bfloat16, all tokens supervised: temporary memory, FLOP and
memory traffic of the compiled program, and how long each takes at least by data sheets.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from jvlm.planning.environment import WITHOUT_A_GPU, WITHOUT_A_TPU

os.environ.update(WITHOUT_A_TPU | WITHOUT_A_GPU)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jvlm_kernels.platforms import compiling_for

from jvlm.planning import gpus, hlo
from jvlm.planning.chips import CHIPS

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, Python looks beside it only

from tools.bench_kernels import each, plain_logits, summed, title_of

COLUMNS = "temporary memory, MiB", "TFLOP", "GB moved", "products, ms", "memory, ms"


def device_of(name: str) -> tuple[jax.Device, str]:
    """Return (a described device, the platform that it belongs to)."""
    if name in gpus.GPUS:
        return gpus.devices(name)[0], "cuda"
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0], "tpu"


def compiled(function: Callable, device: str, tokens: int, hidden: int, vocabulary: int) -> dict[str, float]:
    """Of a loss of (hidden [N, D], kernel [D, V], targets [N]) and both gradients: a figure for each of `COLUMNS`."""
    target, platform = device_of(device)
    sharding = jax.sharding.SingleDeviceSharding(target)
    shapes = ((tokens, hidden), jnp.bfloat16), ((hidden, vocabulary), jnp.bfloat16), ((tokens,), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    with compiling_for(platform):
        program = jax.jit(jax.value_and_grad(function, (0, 1))).lower(*arguments).compile()
    traffic, chip = hlo.read(program.as_text()), CHIPS[device.partition(":")[0]]
    times = 1e3 * traffic.flops / chip.flops, 1e3 * traffic.hbm / chip.hbm_bandwidth
    figures = program.memory_analysis().temp_size_in_bytes / 2**20, traffic.flops / 1e12, traffic.hbm / 1e9, *times
    return dict(zip(COLUMNS, figures, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "devices", nargs="+", help="TPU topologies such as v5e:2x2, or GPUs; one device is compiled for"
    )
    parser.add_argument("--sizes", type=int, nargs=3, default=(8192, 4096, 151936), metavar=("TOKENS", "D", "V"))
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    arguments = parser.parse_args()
    if not arguments.json:
        print(f"| device | loss | {' | '.join(COLUMNS)} |\n| --- | --- |{' ---: |' * len(COLUMNS)}")
    for device in arguments.devices:
        for function in (summed, each, plain_logits):
            found = compiled(function, device, *arguments.sizes)
            if arguments.json:
                print(json.dumps({"device": device, "loss": function.__name__, **found}), flush=True)
            else:
                row = " | ".join(f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in found.values())
                print(f"| {device} | {title_of(function)} | {row} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())

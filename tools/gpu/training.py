"""Train a published shape with random weights on packed images, and say what a step costs: time, MFU, memory, parts.

    python -m tools.gpu.training --preset qwen2_5_vl_7b --layers 8

The step is the one of `jvlm train` (`jvlm.training.compiled_step`). MFU is the declared one of docs/mfu.md: padding is
no work, causal attention is counted half, windows and images as they are, recomputation not at all. Beside it stands
the same run in the manner of two other public counters: lmms-engine's (6 x parameters of the language model, its
embedding table included, and whole squares of attention, at all positions; nothing for the vision tower)
and VLR-CVC's (text, patches and causal pairs are counted, and padding as work).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jvlm.adapters import attach
from jvlm.adapters.config import AdapterConfig
from jvlm.data import packing
from jvlm.data.config import DataConfig
from jvlm.hardware import peak_flops
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.training import compiled_step, flops, train_step
from jvlm.training.config import Experiment, OptimizerConfig
from jvlm.training.starting_model import random_model
from jvlm.training.trainer import split
from jvlm.units import GIB

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, Python looks beside it only

from tools.gpu import workload
from tools.gpu.device_trace import device_seconds

PROFILED = 2  # steps under the profiler


def other_counters(
    experiment: Experiment, template: vlm.VLM, counts: flops.Counts, trained: flops.Trained
) -> dict[str, float]:
    """FLOP of a step as two public trainers count them; see above. The first knows full training alone."""
    decoder, data = experiment.model.decoder, experiment.data
    positions, S = data.batch_size * data.seq_len, data.seq_len
    parameters = vlm.parameter_counts(template)["decoder"]
    width = decoder.num_heads * decoder.head_size
    text_only = 6.0 * parameters * positions + 12.0 * decoder.num_layers * width * S * positions
    # the same products as ours, at every position of the packed sequence, and attention of images as full squares
    padded = dataclasses.replace(
        counts,
        segments=np.append(counts.segments, max(positions - counts.tokens, 0)),
        images=np.append(counts.images, max(data.batch_size * data.max_patches - counts.patches, 0)),
        targets=positions,
    )
    everything = flops.training(template, padded, trained, flops.adapter_ranks(template)).total
    full = {} if experiment.adapter is not None else {"lmms-engine (text only)": text_only}
    return full | {"VLR-CVC (padding is work)": everything}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.add_argument("--attention", help="implementation of segment_attention")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of the decoder, nothing else")
    parser.add_argument("--profile", action="store_true", help="also print the step by parts and its longest kernels")
    arguments = parser.parse_args()
    precision = Precision(param_dtype=arguments.params, remat=arguments.remat, attention=arguments.attention)
    config, processor, examples = workload.workload(arguments, precision)
    data = DataConfig(batch_size=arguments.rows, seq_len=arguments.tokens, max_patches=arguments.patches)
    experiment = Experiment(
        name="gpu_pass",
        model=config,
        tokenizer=str(workload.TOKENIZER),
        data=data,
        adapter=None if arguments.lora is None else AdapterConfig(rank=arguments.lora, targets=("decoder",)),
        optimizer=OptimizerConfig(learning_rate=1e-6),
        steps=1000,
    )
    began = time.perf_counter()
    planned = compiled_step.compile_step(experiment)
    abstract = planned.batches
    batch = packing.assemble(
        examples,
        arguments.tokens,
        arguments.patches,
        patch_values=processor.image_processor.patch_values,
        max_image_patches=abstract.max_image_patches,
    )
    model = random_model(config, 0, planned.layout.parameter)
    if experiment.adapter is not None:
        tokenizer, sharding = processor.tokenizer, planned.layout.parameter
        model = attach.attach(model, experiment.adapter, seed=0, tokenizer=tokenizer, sharding=sharding)
    template, values = split(model)
    del model
    state = planned.init_state(values)
    del values
    lowered = planned.step.lower(state, train_step.stack([batch]))
    compiled = lowered.compile()
    ready = time.perf_counter() - began
    stacked = jax.device_put(train_step.stack([batch]), jax.tree.map(lambda x: x.sharding, planned.batches))
    (changing, constant), state = state.split(), None
    taken, losses = [], []
    for _ in range(arguments.steps):
        began = time.perf_counter()
        changing, metrics = compiled(changing, constant, stacked)
        losses.append(float(metrics["loss"]))
        taken.append(time.perf_counter() - began)
    seconds = statistics.median(taken[1:])
    counts = flops.counts_of([batch])
    trained = flops.Trained.of(template, planned.trainable)
    parts = flops.training(template, counts, trained, flops.adapter_ranks(template))
    peak = peak_flops(jax.devices()[0].device_kind) or float("nan")
    memory = compiled.memory_analysis()
    resident = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    resident += memory.output_size_in_bytes - memory.alias_size_in_bytes
    stats = jax.devices()[0].memory_stats() or {}
    count = sum(vlm.parameter_counts(template).values())
    layers = config.decoder.num_layers
    what = "" if arguments.lora is None else f"LoRA of rank {arguments.lora} on the decoder, "
    print(
        f"{arguments.preset}, {layers} decoder layers, {count / 1e9:.2f} G parameters ({arguments.params}), "
        f"{what}AdamW, "
    )
    print(
        f"remat {arguments.remat}, {arguments.rows} x {arguments.tokens:,} tokens and {arguments.patches:,} patches, "
    )
    print(f"{counts.tokens:,} tokens of {len(counts.segments)} conversations, {counts.patches:,} patches of ")
    print(f"{len(counts.images)} images, {counts.targets:,} supervised; start and compilation {ready:.0f} s\n")
    print("| what | value |\n| --- | ---: |")
    print(f"| step, s (median of {len(taken) - 1}; {min(taken[1:]):.3f} to {max(taken[1:]):.3f}) | {seconds:.3f} |")
    print(f"| tokens a second, padding aside | {counts.tokens / seconds:,.0f} |")
    print(f"| TFLOP of a step, declared | {parts.total / 1e12:.1f} |")
    print(f"| declared MFU of {peak / 1e12:.0f} TFLOP/s | {parts.total / seconds / peak:.1%} |")
    for name, work in other_counters(experiment, template, counts, trained).items():
        print(f"| MFU by the counter of {name} | {work / seconds / peak:.1%} |")
    print(f"| memory by the compiler, GiB | {resident / GIB:.1f} |")
    print(f"| peak memory in use, GiB | {stats.get('peak_bytes_in_use', float('nan')) / GIB:.1f} |")
    print(f"| loss, first and last | {losses[0]:.4f}, {losses[-1]:.4f} |", flush=True)

    if not arguments.profile:
        return
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                changing, metrics = compiled(changing, constant, stacked)
            jax.block_until_ready(metrics)
        by_part, by_kernel = device_seconds(Path(folder), compiled.as_text())
    print_profile(by_part, by_kernel, parts)


def print_profile(by_part: dict[str, float], by_kernel: dict[str, float], work: flops.Parts) -> None:
    """Print device seconds by part of the model, with its declared arithmetic, and the longest kernels."""
    total = sum(by_part.values())
    declared = {"encoder": work.encoder, "connector": work.connector, "decoder": work.decoder, "loss": work.head}
    print(f"\n| part of {total / PROFILED:.3f} s on the device | share | TFLOP/s, declared |\n| --- | ---: | ---: |")
    for top in sorted({part.split("/")[0] for part in by_part}, key=lambda p: -_of(by_part, p)):
        spent = _of(by_part, top)
        rate = f"{declared[top] * PROFILED / spent / 1e12:.0f}" if top in declared else ""
        print(f"| {top} | {spent / total:.1%} | {rate} |")
        for part, seconds in sorted(by_part.items(), key=lambda pair: -pair[1]):
            if part.startswith(f"{top}/"):
                print(f"| - {part} | {seconds / total:.1%} | |")
    print("\n| kernel | share |\n| --- | ---: |")
    for name, seconds in sorted(by_kernel.items(), key=lambda pair: -pair[1])[:15]:
        print(f"| `{name[:90]}` | {seconds / total:.1%} |")


def _of(by_part: dict[str, float], top: str) -> float:
    return sum(seconds for part, seconds in by_part.items() if part.split("/")[0] == top)


if __name__ == "__main__":
    main()

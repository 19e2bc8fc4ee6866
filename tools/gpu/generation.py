"""Time the vision tower, prefill and decoding of a published shape with random weights, bfloat16 parameters.

    python -m tools.gpu.generation --preset qwen2_5_vl_3b

The steps are those of the engine (`jvlm.inference.engine`); prompts are the conversations of the training part.
Decoding is the time of ``--new`` tokens less that of one. Bytes that a step of decoding must read are its weights once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jvlm.data import packing
from jvlm.hardware import peak_flops
from jvlm.inference.engine import Engine
from jvlm.inference.generate import complete
from jvlm.inference.requests import EngineConfig
from jvlm.inference.sampling import SamplingConfig
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.training import flops
from jvlm.training.starting_model import random_model
from jvlm.training.trainer import split

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, Python looks beside it only

from tools.gpu import workload
from tools.gpu.device_trace import device_seconds
from tools.timing import seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=32, help="tokens to decode")
    parser.add_argument("--profile", action="store_true", help="also print the longest kernels of decoding")
    arguments = parser.parse_args()
    config, processor, rows = workload.workload(arguments, Precision(param_dtype="bfloat16"))
    model = random_model(config, 0, None)
    peak = peak_flops(jax.devices()[0].device_kind) or float("nan")
    examples = rows[0]
    batch = packing.assemble(
        [examples], arguments.tokens, arguments.patches, patch_values=processor.image_processor.patch_values
    )
    template, values = split(model)
    counts = flops.counts_of([batch])
    work = flops.forward(template, counts)
    last = np.flatnonzero(np.diff(batch.segment_ids[0], append=0) != 0)[: len(examples)]
    device_batch = jax.device_put(batch)

    def tower(values, batch, template=template):
        return vlm.bind(template, values).encoder(batch).tokens

    def prefill(values, batch, template=template):
        bound = vlm.bind(template, values)
        return bound.decoder.logits(bound.hidden(batch).hidden[0, last])

    count = sum(vlm.parameter_counts(template).values())
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {count / 1e9:.2f} G parameters, bfloat16\n")
    print("| what | ms | MFU or TB/s |\n| --- | ---: | ---: |")
    took = seconds(jax.jit(tower), (values, device_batch), 5)
    images = f"{len(counts.images)} images, {counts.patches:,} patches"
    print(f"| vision tower, {images}, packed | {1e3 * took:.1f} | {work['encoder'].total / took / peak:.1%} |")
    took = seconds(jax.jit(prefill), (values, device_batch), 5)
    total = sum(work[part].total for part in ("encoder", "connector", "decoder"))
    prompts = f"{len(examples)} prompts, {counts.tokens:,} tokens"
    print(f"| prefill, {prompts}, packed | {1e3 * took:.1f} | {total / took / peak:.1%} |", flush=True)
    del values, template
    longest = max(example.length for example in examples) + arguments.new
    sizes = EngineConfig(
        max_slots=max(arguments.batches),
        decode_slots=tuple(sorted(arguments.batches)),
        max_model_len=-(-longest // 256) * 256,
        prefill_tokens=(2048,),
        encode_patches=(8192,),
    )
    engine = Engine(model, processor, sizes)  # few sizes, since each program takes a GPU's compiler many seconds
    began = time.perf_counter()
    engine.warm_up()
    print(
        f"| {sum(engine.compilations.values())} programs compiled | {1e3 * (time.perf_counter() - began):.0f} | |",
        flush=True,
    )
    read = 2.0 * vlm.parameter_counts(model)["decoder"]
    for number in arguments.batches:
        prompts = (examples * number)[:number]

        def run(new: int, prompts=prompts) -> float:
            settings = SamplingConfig(max_new_tokens=new, stop_token_ids=())
            began = time.perf_counter()
            complete(engine, prompts, settings, request_ids=range(len(prompts)))  # prompts are cached after the first
            return time.perf_counter() - began

        for new in (1, arguments.new):
            run(new)
        long, short = (min(run(new) for _ in range(3)) for new in (arguments.new, 1))
        step = (long - short) / (arguments.new - 1)
        print(f"| decoding, {number} at once, a step | {1e3 * step:.2f} | {read / step / 1e12:.2f} |", flush=True)

        if arguments.profile:
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    run(arguments.new)
                _, kernels = device_seconds(Path(folder), "")
            total = sum(kernels.values())
            print(f"\n| kernel, of {1e3 * total:.1f} ms on the device | share |\n| --- | ---: |")
            for name, spent in sorted(kernels.items(), key=lambda pair: -pair[1])[:20]:
                print(f"| `{name[:90]}` | {spent / total:.1%} |")


if __name__ == "__main__":
    main()

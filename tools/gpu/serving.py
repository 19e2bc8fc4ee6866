"""Requests with images through the engine of a published shape with random weights: rate, first token, time per token.

    python -m tools.gpu.serving --preset qwen2_5_vl_7b

Two kinds of request, each with images of its own: one image of 1 MP with 256 tokens of text, answered by 256 tokens, at
random times (``--rate`` a second on average); and six images of 736 x 736 with 1,000 tokens of text, answered by 128
tokens, all at once, as in tpu-inference's test of Qwen2.5-VL-7B. Answers do not end early: tokens got are tokens asked.
Requests are encoded before the clock starts; a server does that on the processors beside the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.inference.engine import Engine
from jvlm.inference.requests import EngineConfig, Request, SamplingParams
from jvlm.models.layers import Precision
from jvlm.training.starting_model import random_model

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, Python looks beside it only

from tools.gpu import workload


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of request: its images, tokens of its text and of its answer, and how many come in all.

    Attributes:
      rate: requests a second on average, at random times; None is all at once.
    """

    name: str
    images: tuple[tuple[int, int], ...]
    text: int
    answer: int
    count: int
    rate: float | None


def prompts(processor: Processor, kind: Kind, seed: int) -> list[Example]:
    """Return the prompts of a kind; no two have an image in common."""
    rng, found = np.random.default_rng(seed), []
    words = "what is in the image? "
    each = processor.encode(_asked(words * 20, [])).length - processor.encode(_asked(words * 10, [])).length
    for number in range(kind.count):
        images = [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for h, w in kind.images]
        text = f"question {number}: " + words * max(1, round(10 * kind.text / each))
        found.append(processor.encode(_asked(text, images), generation_prompt=True))
    return found


def _asked(text: str, images: list[Image.Image]) -> dict:
    return {"messages": [{"role": "user", "content": "<image>" * len(images) + text}], "images": images}


def serve(engine: Engine, examples: list[Example], kind: Kind, seed: int) -> None:
    """Run the requests of a kind and print a line of the table."""
    settings = SamplingParams(temperature=0.0, max_tokens=kind.answer, ignore_eos=True, detokenize=False)
    gaps = (
        np.zeros(len(examples))
        if kind.rate is None
        else np.random.default_rng(seed).exponential(1 / kind.rate, len(examples))
    )
    began = time.perf_counter()
    arrives = began + np.cumsum(gaps)
    tokens: dict[str, list[float]] = {f"{kind.name} {i}": [] for i in range(len(examples))}
    waiting = list(enumerate(examples))
    while waiting or engine.has_work:
        while waiting and time.perf_counter() >= arrives[waiting[0][0]]:
            number, example = waiting.pop(0)
            engine.submit(Request(f"{kind.name} {number}", example, settings))
        if not engine.has_work:
            time.sleep(max(0.0, arrives[waiting[0][0]] - time.perf_counter()))
            continue
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.token is not None:
                tokens[event.request_id].append(time.perf_counter())
    took = max(times[-1] for times in tokens.values()) - began
    wrong = [name for name, times in tokens.items() if len(times) != kind.answer]
    if wrong:
        raise RuntimeError(
            f"{wrong[0]} and {len(wrong) - 1} more have not the {kind.answer} tokens that were asked for"
        )
    first = [times[0] - at for times, at in zip(tokens.values(), arrives, strict=True)]
    each = [(times[-1] - times[0]) / (kind.answer - 1) for times in tokens.values()]
    height, width = kind.images[0]
    what = f"{len(kind.images)} images of {width} x {height}, {examples[0].length:,} to {kind.answer} tokens"
    when = "all at once" if kind.rate is None else f"{kind.rate:g} a second"
    print(
        f"| {what} | {kind.count}, {when} | {kind.count / took:.2f} | {kind.count * kind.answer / took:,.0f} "
        f"| {1e3 * np.percentile(first, 50):,.0f} / {1e3 * np.percentile(first, 95):,.0f} "
        f"| {1e3 * np.percentile(each, 50):.1f} / {1e3 * np.percentile(each, 95):.1f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.add_argument("--rate", type=float, default=8.0, help="requests with one image a second")
    parser.add_argument("--requests", type=int, default=96, help="with one image; half as many have six")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.requests, arguments.layers = 8, 2
    config = workload.model_config(
        arguments.preset, arguments.layers, Precision(param_dtype="bfloat16"), arguments.small
    )
    processor = workload.processor_of(config)
    scale = 8 if arguments.small else 1
    one, six, text = 1008 // scale // 28 * 28, 736 // scale // 28 * 28, 1000 // scale
    kinds = [
        Kind("one", ((one, one),), 256 // scale, 256 // scale, arguments.requests, arguments.rate),
        Kind("six", ((six, six),) * 6, text, 128 // scale, arguments.requests // 2, None),
    ]
    found = [prompts(processor, kind, seed) for seed, kind in enumerate(kinds)]
    longest = max(e.length + kind.answer for kind, examples in zip(kinds, found, strict=True) for e in examples)
    sizes = EngineConfig(
        max_slots=64,
        decode_slots=(16, 64),
        max_model_len=-(-longest // 512) * 512,
        prefill_tokens=(2048,),
        encode_patches=(6144,),
        feature_slots=16384,
        tpot_goal=0.05,  # as `jvlm serve`
    )
    engine = Engine(random_model(config, 0, None), processor, sizes)
    began = time.perf_counter()
    engine.warm_up()
    compiled = sum(engine.compilations.values())
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {arguments.preset}, bfloat16 parameters; ", end="")
    print(f"{compiled} programs compiled in {time.perf_counter() - began:.0f} s\n")
    print("| requests of | how many | requests/s | tokens/s | first token, ms (50 / 95 %) | a token, ms (50 / 95 %) |")
    print("| --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for seed, (kind, examples) in enumerate(zip(kinds, found, strict=True)):
        serve(engine, examples, kind, seed)
    late = engine.stats().compilations_after_ready
    print(f"\n{late} programs were compiled after the engine was ready")


if __name__ == "__main__":
    main()

"""Tokens a second of the engine at 1, 8 and 32 requests of a small random model, and of another version of it.

    python tools/bench_engine.py
    python tools/bench_engine.py --before ../another/worktree

``--before`` names a checkout whose closed-batch `Engine.steps` (before requests and slots) answers the same prompts, in
a process of its own after this one. Every program is compiled before it is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COUNTS, PROMPT, NEW = (1, 8, 32), 40, 64


def model_and_examples():
    """Return a model, a stand-in for its processor, and prompts with a picture of 64 patches each."""
    sys.path[:0] = [os.getcwd(), str(Path(os.getcwd()) / "kernels")]
    import dataclasses

    import numpy as np

    from jvlm.training import starting_model
    from tests.inference import many_devices

    config = many_devices.MODELS["qwen2_5_vl"]
    wide = dataclasses.replace(config.decoder, max_position_embeddings=4096)
    config = dataclasses.replace(config, decoder=wide)
    model, processor = starting_model.random_model(config, 0, None), many_devices.processor(config)
    tokenizer = processor.tokenizer
    tokenizer.added_tokens_decoder, tokenizer.clean_up_tokenization_spaces = {}, False
    tokenizer.convert_ids_to_tokens, tokenizer.decode = str, lambda ids, **_: " ".join(map(str, ids))
    processor.decode = tokenizer.decode
    rng, examples = np.random.default_rng(0), []
    (base,) = many_devices.prompts(config, 2)[1:]
    for _ in range(max(COUNTS)):
        tokens = np.where(base.vision_index >= 0, base.tokens, rng.integers(0, 140, base.length)).astype(np.int32)
        media = (base.vision_index >= 0).astype(np.int32)
        patches = rng.integers(0, 256, base.patches.shape).astype(np.uint8)
        examples.append(dataclasses.replace(base, tokens=tokens, media=media, patches=patches))
    return model, processor, examples


def timed(run, rounds: int) -> float:
    """Return the least seconds of a call, after one that compiles."""
    run()
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def now(rounds: int) -> dict[str, float]:
    """Return the tokens a second of this version."""
    model, processor, examples = model_and_examples()
    from jvlm.inference.engine import Engine
    from jvlm.inference.generate import complete
    from jvlm.inference.requests import EngineConfig
    from jvlm.inference.sampling import SamplingConfig

    config = EngineConfig(
        max_slots=max(COUNTS), prefill_tokens=(64, 256, 1024), encode_patches=(256, 1024), prefix_cache=False
    )
    engine, found = Engine(model, processor, config), {}
    sampling = SamplingConfig(max_new_tokens=NEW, stop_token_ids=())
    for count in reversed(COUNTS):  # the first requests decide how many pages there are
        prompts = examples[:count]
        seconds = timed(lambda p=prompts: complete(engine, p, sampling, request_ids=range(len(p))), rounds)
        found[str(count)] = count * NEW / seconds
    return found


def before(rounds: int) -> dict[str, float]:
    """Return the tokens a second of the closed batch, in its own checkout."""
    model, processor, examples = model_and_examples()
    from jvlm.inference.engine import Engine
    from jvlm.inference.sampling import SamplingConfig

    engine, found = Engine(model, processor), {}
    sampling = SamplingConfig(max_new_tokens=NEW, stop_token_ids=())
    for count in COUNTS:
        prompts = examples[:count]
        seconds = timed(lambda p=prompts: list(engine.steps(p, sampling)), rounds)
        found[str(count)] = count * NEW / seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of a version with Engine.steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=("now", "before"), help="one version, as JSON")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps({"now": now, "before": before}[arguments.part](arguments.rounds)))
        return

    def run(part: str, folder: Path) -> dict[str, float]:
        command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--rounds", str(arguments.rounds)]
        path = os.pathsep.join(str(folder / name) for name in ("", "kernels"))
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    found = {"engine": run("now", ROOT)}
    if arguments.before:
        found["closed batch"] = run("before", arguments.before.resolve())
    print("| tokens/s, requests at once | " + " | ".join(map(str, COUNTS)) + " |\n| --- |" + " ---: |" * len(COUNTS))
    for name, speeds in found.items():
        print(f"| {name} | " + " | ".join(f"{speeds[str(count)]:,.0f}" for count in COUNTS) + " |")


if __name__ == "__main__":
    main()

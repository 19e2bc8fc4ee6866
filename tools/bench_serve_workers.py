"""The processes of `tools.bench_serve`: they make its models, or answer without HTTP when a line says so.

python -m tools.bench_serve_workers toy|small FOLDER              # write a random model
python -m tools.bench_serve_workers engine|transformers FOLDER    # a task of JSON a line, an answer of JSON a line
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT, SLOTS, PREFILL = 1024, 32, 256


def example(body: dict[str, Any]) -> dict[str, Any]:
    """Return a chat body as an example in ms-swift's form."""
    (message,) = body["messages"]
    text, images = "", []
    for part in message["content"]:
        if part["type"] == "text":
            text += part["text"]
        else:
            text += "<image>"
            images.append(base64.b64decode(part["image_url"]["url"].partition(",")[2]))
    return {"messages": [{"role": "user", "content": text}], "images": images}


def make_toy(folder: Path) -> None:
    """Write the random model of the tests."""
    from tests import support

    tokenizer = support.make_tokenizer(folder / "tokenizer")
    config = support.tiny_config(support.token_ids(tokenizer))
    support.write_folder(folder, tokenizer, config, limits=(4 * 784, 64 * 784))
    support.write_tensors(folder, support.random_tensors(support.tensor_shapes(config)))


def make_small(folder: Path) -> None:
    """Write the random model of tools/bench_model.py."""
    from tools import bench_model

    folder.mkdir()
    bench_model.make_checkpoint(folder)


def engine(folder: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what answers with the engine alone, so many requests at a time."""
    import jvlm
    from jvlm.inference.engine import Engine
    from jvlm.inference.requests import Request, SamplingParams
    from jvlm.server.arguments import ServerArguments, engine_config

    model, processor = jvlm.load(folder)
    as_served = ServerArguments(max_num_seqs=SLOTS, max_model_len=CONTEXT, max_num_batched_tokens=PREFILL)
    made = Engine(model, processor, engine_config(as_served, on_cpu=True))
    made.warm_up()
    count = 0

    def run(task: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        prompts = [processor.encode(example(body), generation_prompt=True) for body in task["bodies"]]
        left = list(zip(prompts, task["bodies"], strict=True))[::-1]
        began, tokens, running = time.perf_counter(), 0, 0
        while left or running:
            while left and running < task["streams"]:
                prompt, body = left.pop()
                sampling = SamplingParams(max_tokens=body["max_tokens"], ignore_eos=True)
                made.submit(Request(str(count), prompt, sampling))
                count, running = count + 1, running + 1
            for event in made.step():
                tokens += event.token is not None
                running -= event.finish_reason is not None
        assert tokens == sum(body["max_tokens"] for body in task["bodies"])
        return {"tokens_per_second": tokens / (time.perf_counter() - began)}

    return run


def transformers(folder: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what answers with transformers' `generate`, one request after another or all that wait as a batch."""
    import os

    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    import jvlm
    from tools.bench_model import torch_inputs

    torch.set_num_threads(os.cpu_count())
    processor = jvlm.load(folder)[1]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32).eval()

    def generate(prompts: list[Any], new: int) -> None:
        inputs = {k: v for k, v in torch_inputs(prompts, processor).items() if k not in ("labels", "position_ids")}
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + new

    def run(task: dict[str, Any]) -> dict[str, Any]:
        prompts = [processor.encode(example(body), generation_prompt=True) for body in task["bodies"]]
        new = [body["max_tokens"] for body in task["bodies"]]
        generate(prompts[:1], 4)
        began, done = time.perf_counter(), 0
        while done < len(prompts):
            time.sleep(max(began + task["times"][done] - time.perf_counter(), 0))
            arrived = sum(at <= time.perf_counter() - began for at in task["times"])
            end = min(max(arrived, done + 1), done + SLOTS) if task["way"] == "batched" else done + 1
            generate(prompts[done:end], max(new[done:end]))
            done = end
        seconds = time.perf_counter() - began - task["times"][0]
        return {"tokens_per_second": sum(new) / seconds}

    return run


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if kind in ("toy", "small"):
        {"toy": make_toy, "small": make_small}[kind](folder)
        return
    run = {"engine": engine, "transformers": transformers}[kind](folder)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

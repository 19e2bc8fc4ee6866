"""jvlm against transformers + torch on this machine: the same weights, the same inputs, one run, ratios.

    make bench                      # or: python tools/bench.py --rounds 5

A model of about 40 M parameters of the Qwen2.5-VL architecture, float32, with conversations of mixed lengths about
images of mixed sizes. Both sides run the same work: jvlm packs examples, torch gets left-padded batches, as its users
do, or one conversation at a time where that is faster for it. Rounds alternate between the two; the best of each
counts.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import jvlm
from jvlm.data import packing
from jvlm.data.packing import Example
from jvlm.data.processor import Processor
from jvlm.inference.generate import complete, engine_for
from jvlm.inference.sampling import SamplingConfig
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.training import optimizer, train_step
from jvlm.training.config import OptimizerConfig
from jvlm.training.state import TrainState
from jvlm.training.supervised import SupervisedTask
from jvlm.training.trainer import split

TOKENIZER = Path(__file__).parents[1] / "configs/mimo_vl/easy_vqa_data/tokenizer"
VOCABULARY = 16384


def make_checkpoint(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """Return a random model in a Hugging Face folder, and the same in torch."""
    tokenizer = AutoTokenizer.from_pretrained(str(TOKENIZER))
    # a word for every id of the model: jvlm never emits an id without one, transformers does
    tokenizer.add_tokens([f"<|word_{i}|>" for i in range(len(tokenizer), VOCABULARY)])
    ids = {t: tokenizer.convert_tokens_to_ids(f"<|{t}|>") for t in ("image_pad", "video_pad", "vision_start", "im_end")}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": 8,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_heads": 4,
            "out_hidden_size": 512,
            "fullatt_block_indexes": [3, 7],
            "tokens_per_second": 2,
        },
        tie_word_embeddings=True,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_start"] + 1,
        eos_token_id=ids["im_end"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return model


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of 20 to 200 words about zero to two images of 84 to 336 pixels."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        sizes = [tuple(28 * rng.integers(3, 13, 2)) for _ in range(index % 3)]
        images = [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in sizes]
        words = "is there a red shape in the image? " * int(rng.integers(2, 24))
        messages = [
            {"role": "user", "content": "<image>" * len(images) + words},
            {"role": "assistant", "content": "yes, " * int(rng.integers(4, 40))},
        ]
        examples.append({"messages": messages, "images": images})
    return examples


def filled(examples: list[Example], processor: Processor) -> dict[str, int]:
    """Return the shape of a sequence that the examples fill, as training's packing fills those of its config."""
    step = packing.patch_step(processor.image_processor.patch_group, 128)
    patches = sum(e.num_patches for e in examples)
    return {"seq_len": -(-sum(e.length for e in examples) // 64) * 64, "max_patches": -(-patches // step) * step}


def torch_inputs(examples: list[Example], processor: Processor) -> dict[str, torch.Tensor]:
    """Return the same conversations as transformers wants them: left-padded, pixels normalised, explicit positions."""
    longest = max(e.length for e in examples)
    tokens = np.full((len(examples), longest), processor.tokenizer.pad_token_id, np.int64)
    mask = np.zeros_like(tokens)
    labels = np.full_like(tokens, -100)
    positions = np.ones((3, *tokens.shape), np.int64)
    encoder = processor.model.encoder
    unit = encoder.patch_size * encoder.spatial_merge_size
    mean = np.repeat(np.float32(encoder.image_mean), encoder.patch_values // 3)
    std = np.repeat(np.float32(encoder.image_std), encoder.patch_values // 3)
    pixels, grids = [], []
    for record, example in enumerate(examples):
        span = slice(longest - example.length, longest)
        tokens[record, span], mask[record, span] = example.tokens, 1
        labels[record, span] = np.where(example.loss_weights > 0, example.tokens, -100)
        positions[:, record, span] = example.positions.T
        index = example.vision_index[example.vision_index >= 0]
        cells = example.patches.reshape(-1, 4, encoder.patch_values)[index]
        pixels.append((cells.reshape(-1, encoder.patch_values).astype(np.float32) / 255 - mean) / std)
        grids += [[1, 2 * (h // unit), 2 * (w // unit)] for _, (w, h) in example.sizes]
    result = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "labels": labels}
    if grids:
        result |= {"pixel_values": np.concatenate(pixels), "image_grid_thw": np.asarray(grids)}
    result["mm_token_type_ids"] = (tokens == processor.model.image_token_id).astype(np.int64)
    return {name: torch.from_numpy(value) for name, value in result.items()}


def race(
    rounds: int, *, clock: Callable[[], float] = time.perf_counter, **runners: Callable[[], Any]
) -> dict[str, float]:
    """Best seconds of each runner; they take turns, after one warm-up each."""
    best = dict.fromkeys(runners, float("inf"))
    for run in runners.values():
        run()
    for _ in range(rounds):
        for name, run in runners.items():
            began = clock()
            run()
            best[name] = min(best[name], clock() - began)
    return best


def prefill(model: VLM, processor: Processor, oracle, rounds: int) -> dict[str, Any]:
    """Logits after the last token of each of 8 prompts."""
    records = conversations(8)
    examples = [processor.encode(record, generation_prompt=True) for record in records]
    batch = processor.pack(records, generation_prompt=True)
    last = np.array([np.flatnonzero(batch.segment_ids[0] == i)[-1] for i in range(1, len(records) + 1)])
    template, values = split(model)

    @jax.jit
    def run_packed(values, batch):
        bound = vlm.bind(template, values)
        return bound.decoder.logits(bound.hidden(batch).hidden[0, last])

    def ours():
        return np.asarray(run_packed(values, batch))

    together = torch_inputs(examples, processor)
    singly = [torch_inputs([e], processor) for e in examples]

    def theirs(inputs):
        with torch.inference_mode():
            return oracle(**{k: v for k, v in inputs.items() if k != "labels"}, logits_to_keep=1).logits[:, -1].numpy()

    difference = np.abs(ours() - np.concatenate([theirs(i) for i in singly])).max()
    assert difference < 1e-3, f"the two sides differ by {difference}"
    best = race(rounds, jvlm=ours, padded=lambda: theirs(together), singly=lambda: [theirs(i) for i in singly])
    return result("prefill", sum(e.length for e in examples), best, "tokens/s", difference)


def train(model: VLM, processor: Processor, oracle, rounds: int) -> dict[str, Any]:
    """Forward, backward, clipping and AdamW on 16 conversations."""
    records = conversations(16, seed=1)
    examples = [processor.encode(record) for record in records]
    batch = processor.pack(records, **filled(examples, processor))
    template, values = split(model)
    tx = optimizer.make(OptimizerConfig(learning_rate=1e-6), 1000, vlm.parameters(template))
    step = train_step.TrainStep(template, SupervisedTask(), tx)
    copies = {path: jnp.array(value) for path, value in values.items()}
    state = TrainState(jnp.zeros((), jnp.int32), copies, tx.init(copies))
    state = jax.device_put(state, jax.devices()[0])  # as in the training loop: the second step compiles nothing
    stacked = train_step.stack([batch])
    first_loss: dict[str, float] = {}

    def ours():
        nonlocal state
        state, metrics = step(state, stacked)
        first_loss.setdefault("jvlm", float(metrics["loss"]))
        return jax.block_until_ready(state)

    oracle.train()
    adam = torch.optim.AdamW(oracle.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1)
    together = torch_inputs(examples, processor)
    singly = [torch_inputs([e], processor) for e in examples]
    targets = sum(int((i["labels"][:, 1:] >= 0).sum()) for i in singly)

    def theirs(name: str, inputs):
        adam.zero_grad()
        total = 0.0
        for part in inputs:
            loss = oracle(**part, num_items_in_batch=torch.tensor(targets)).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        adam.step()
        first_loss.setdefault(name, total)

    best = race(
        rounds,
        jvlm=ours,
        padded=lambda: theirs("padded", [together]),
        singly=lambda: theirs("singly", singly),
    )
    oracle.eval()
    difference = abs(first_loss["jvlm"] - first_loss["padded"])
    assert difference < 1e-3, f"the losses of the first step differ: {first_loss}"
    return result("training step", sum(e.length for e in examples), best, "tokens/s", difference)


def decode(model: VLM, processor: Processor, oracle, rounds: int, records: int, new: int = 64) -> dict[str, Any]:
    """Greedy tokens after the first, with a cache; prefill is timed apart and taken off."""
    examples = [processor.encode(record, generation_prompt=True) for record in conversations(records, seed=2)]
    engine = engine_for(model, processor, slots=records)
    inputs = {k: v for k, v in torch_inputs(examples, processor).items() if k not in ("labels", "position_ids")}

    def ours(count: int):
        settings = SamplingConfig(max_new_tokens=count, stop_token_ids=(-1,))
        return [list(one.tokens) for one in complete(engine, examples, settings, request_ids=range(records))]

    def theirs(count: int):
        with torch.inference_mode():
            out = oracle.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    whole = race(rounds, jvlm=lambda: ours(new), torch=lambda: theirs(new))
    first = race(rounds, jvlm=lambda: ours(1), torch=lambda: theirs(1))
    best = {name: whole[name] - first[name] for name in whole}
    same = sum(a == b for a, b in zip(ours(4), theirs(4), strict=True))
    return result(f"decode, {records} at once", records * (new - 1), best, "tokens/s", f"{same}/{records} start alike")


def result(name: str, work: int, best: dict[str, float], unit: str, check: Any) -> dict[str, Any]:
    """Return speeds and their ratio, of so much work and the seconds that `race` gave."""
    others = {k: v for k, v in best.items() if k != "jvlm"}
    fastest = min(others, key=others.get)
    return {
        "name": name,
        "jvlm": work / best["jvlm"],
        "torch": work / others[fastest],
        "ratio": others[fastest] / best["jvlm"],
        "unit": unit,
        "torch way": fastest,
        "check": check if isinstance(check, str) else f"differ by {check:.1e}",
    }


HEADER = f"{'':<24}{'jvlm':>10}{'torch':>12}{'ratio':>8}   torch's best way, check"


def line(r: dict[str, Any]) -> str:
    """Return a result as a line of the table."""
    speeds = f"{r['jvlm']:>10,.0f}  {r['torch']:>10,.0f}  {r['ratio']:>6.2f}x"
    return f"{r['name']:<24}{speeds}   {r['torch way']}, {r['check']}; {r['unit']}"


MEASURES = {
    "prefill": prefill,
    "decode-1": functools.partial(decode, records=1),
    "decode-8": functools.partial(decode, records=8),
    "train": train,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        oracle = make_checkpoint(Path(folder))
        model, processor = jvlm.load(folder)
    count = sum(vlm.parameter_counts(model).values())
    machine = f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}, torch {torch.__version__}"
    print(f"{count / 1e6:.1f} M parameters, float32, {machine}")
    print(HEADER, flush=True)
    results = []
    for name in arguments.only:
        results.append(MEASURES[name](model, processor, oracle, arguments.rounds))
        print(line(results[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

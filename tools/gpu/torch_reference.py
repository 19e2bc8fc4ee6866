"""The same work in transformers + torch: a training step, prefill, decoding and the vision tower.

    python -m tools.gpu.torch_reference train --preset qwen2_5_vl_7b --layers 8
    python -m tools.gpu.torch_reference generate --preset qwen2_5_vl_3b

Options and conversations are those of training.py and generation.py beside this file. Run it with JAX_PLATFORMS=cpu:
the device is torch's. It gets what its users have without further packages: bfloat16 autocast, SDPA, gradient
checkpointing, fused AdamW; conversations one by one with accumulated gradients, or left-padded into one batch. The
faster way counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from jvlm.models.layers import Precision
from jvlm.models.vlm import VLMConfig
from jvlm.units import GIB

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, Python looks beside it only

from tools.bench_model import torch_inputs
from tools.gpu import workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def torch_model(config: VLMConfig, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """Return a random model of the same shape, made on the device."""
    decoder, encoder = config.decoder, config.encoder
    settings = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": decoder.vocab_size,
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.intermediate_size,
            "num_hidden_layers": decoder.num_layers,
            "num_attention_heads": decoder.num_heads,
            "num_key_value_heads": decoder.num_kv_heads,
            "max_position_embeddings": decoder.max_position_embeddings,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": decoder.rope_theta,
                "mrope_section": list(decoder.mrope_section),
            },
        },
        vision_config={
            "depth": encoder.depth,
            "hidden_size": encoder.hidden_size,
            "intermediate_size": encoder.intermediate_size,
            "num_heads": encoder.num_heads,
            "out_hidden_size": decoder.hidden_size,
            "fullatt_block_indexes": list(encoder.fullatt_block_indexes),
            "tokens_per_second": encoder.tokens_per_second,
        },
        tie_word_embeddings=decoder.tie_word_embeddings,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        eos_token_id=config.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen2_5_VLForConditionalGeneration._from_config(settings, attn_implementation="sdpa", dtype=dtype)
    return model.to(DEVICE)


def on_device(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def median_seconds(run: Callable[[], object], rounds: int) -> float:
    """Median time of a call, after one that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def train(arguments: argparse.Namespace) -> None:
    """Print seconds of a step: forward, backward, clipping and AdamW on the conversations of the packed sequences."""
    config, processor, rows = workload.workload(arguments, Precision())
    examples = [example for row in rows for example in row]
    model = torch_model(config, getattr(torch, arguments.params)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adam = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=DEVICE == "cuda")
    singly = [on_device(torch_inputs([e], processor)) for e in examples]
    together = [on_device(torch_inputs(examples, processor))]
    supervised = sum(int((i["labels"][:, 1:] >= 0).sum()) for i in singly)

    def step(parts: list[dict[str, torch.Tensor]]) -> None:
        adam.zero_grad()
        for part in parts:
            with torch.autocast(DEVICE, torch.bfloat16):
                model(**part, num_items_in_batch=torch.tensor(supervised, device=DEVICE)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()

    tokens = sum(e.length for e in examples)
    print(
        f"torch {torch.__version__}, {arguments.params} parameters, bfloat16 autocast, gradient checkpointing, SDPA\n"
    )
    print("| conversations | s a step | tokens a second | peak memory, GiB |\n| --- | ---: | ---: | ---: |")
    for name, parts in (("one by one", singly), ("padded", together)):
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = median_seconds(lambda parts=parts: step(parts), max(2, arguments.steps // 2))
        except torch.OutOfMemoryError as error:
            print(f"| {name} | does not run: {str(error).splitlines()[0][:80]} | | |", flush=True)
            adam.zero_grad()
            continue
        peak = torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else float("nan")
        print(f"| {name} | {seconds:.3f} | {tokens / seconds:,.0f} | {peak:.1f} |", flush=True)


def generate(arguments: argparse.Namespace) -> None:
    """Print seconds of the vision tower, of prefill and of a decoding step."""
    config, processor, rows = workload.workload(arguments, Precision())
    model = torch_model(config, torch.bfloat16).eval()
    print(f"torch {torch.__version__}, bfloat16, SDPA\n\n| what | ms |\n| --- | ---: |")
    examples = rows[0]
    together = on_device(torch_inputs(examples, processor))
    pixels, grids = together["pixel_values"].to(torch.bfloat16), together["image_grid_thw"]
    with torch.inference_mode():
        tower = median_seconds(lambda: model.model.visual(pixels, grid_thw=grids), 5)
        print(f"| vision tower, {len(grids)} images, {len(pixels):,} patches | {1e3 * tower:.1f} |", flush=True)
        singly = [on_device(torch_inputs([e], processor)) for e in examples]
        for part in singly:
            part.pop("labels")
        prompts = median_seconds(lambda: [model(**part, logits_to_keep=1) for part in singly], 3)
        tokens = sum(e.length for e in examples)
        print(f"| prefill, {len(examples)} prompts, {tokens:,} tokens, one by one | {1e3 * prompts:.1f} |", flush=True)
        for count in arguments.batches:
            batch = on_device(torch_inputs((examples * count)[:count], processor))
            inputs = {k: v for k, v in batch.items() if k not in ("labels", "position_ids")}

            def run(new: int, inputs=inputs) -> None:
                model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)

            long, short = (median_seconds(lambda new=new: run(new), 1) for new in (arguments.new, 1))
            step = (long - short) / (arguments.new - 1)
            print(f"| decoding, {count} at once, a step | {1e3 * step:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "generate"))
    workload.add_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=32, help="tokens to decode")
    arguments = parser.parse_args()
    {"train": train, "generate": generate}[arguments.what](arguments)


if __name__ == "__main__":
    main()

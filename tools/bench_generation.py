"""Prefill and decoding beside transformers."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch

from jvlm.data.processor import Processor
from jvlm.inference.generate import complete, engine_for
from jvlm.inference.sampling import SamplingConfig
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.training.trainer import split
from tools.bench_model import conversations, torch_inputs
from tools.bench_rounds import Clock, Result, race, timed


def prefill(model: VLM, processor: Processor, oracle, *, clock: Clock, **limits: Any) -> Result:
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
    ways = {
        "padded": timed(lambda: theirs(together), clock),
        "singly": timed(lambda: [theirs(i) for i in singly], clock),
    }
    rounds = race(timed(ours, clock), ways, **limits)
    return Result("prefill", sum(e.length for e in examples), "tokens/s", rounds, f"differ by {difference:.1e}")


def decode(
    model: VLM, processor: Processor, oracle, *, clock: Clock, records: int, new: int = 64, **limits: Any
) -> Result:
    """Greedy tokens after the first, with a cache; prefill is timed apart in each round and taken off."""
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

    def after_first(run) -> float:
        return timed(lambda: run(new), clock)() - timed(lambda: run(1), clock)()

    same = sum(a == b for a, b in zip(ours(4), theirs(4), strict=True))
    rounds = race(lambda: after_first(ours), {"torch": lambda: after_first(theirs)}, **limits)
    check = f"{same}/{records} start alike"
    return Result(f"decode, {records} at once", records * (new - 1), "tokens/s", rounds, check)

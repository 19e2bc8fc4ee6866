"""A training step of LoRA and DoRA: jvlm against PEFT + torch on this machine, one run, ratios.

    make bench                      # the last part of it, or:
    PYTHONPATH=.venv/export-peft .venv/bin/python -m tools.bench_lora --rounds 5

The model, the conversations and the ways of torch are those of bench.py. Both sides start from the same adapter: jvlm
makes it and writes the PEFT folder that PEFT trains. A step is forward, backward, clipping and AdamW, in float32; the
losses of the first steps must agree. Rounds alternate between the two; the best of each counts.

A machine with other work gives figures that mean something by CPU time on one core:

    PYTHONPATH=.venv/export-peft taskset -c 0 .venv/bin/python -m tools.bench_lora --cpu-time
"""

from __future__ import annotations

import argparse
import dataclasses
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
import peft
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import jvlm
from jvlm.adapters.attach import attach, extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.peft_write import write_peft
from jvlm.data.processor import Processor
from jvlm.models import vlm
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.training import optimizer, train_step, trainable
from jvlm.training.config import OptimizerConfig
from jvlm.training.state import TrainState
from jvlm.training.supervised import SupervisedTask
from jvlm.training.trainer import split
from tools import bench

RATE, STEPS_COMPARED = 1e-3, 3
OPTIMIZER = OptimizerConfig(learning_rate=RATE, schedule="constant", warmup_ratio=0.0)
CASES = {
    "LoRA, language model": AdapterConfig(rank=8, targets=("decoder",)),
    "LoRA, all linear maps": AdapterConfig(rank=8, targets=("all-linear",)),
    "DoRA, language model": AdapterConfig(rank=8, targets=("decoder",), use_dora=True),
}


@dataclasses.dataclass
class Ours:
    """jvlm's side: one packed batch."""

    step: train_step.TrainStep
    state: TrainState
    batches: Any

    @classmethod
    def of(cls, model: VLM, batch: PackedBatch) -> Ours:
        template, values = split(model)
        variables = vlm.variables(template)
        chosen = trainable.select(trainable.from_config(OPTIMIZER, template.adapters), variables)
        tx = optimizer.make(OPTIMIZER, 1000, chosen)
        params = {path: jnp.array(values[path]) for path in chosen}
        frozen = {path: value for path, value in values.items() if path not in chosen}
        state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), frozen)
        state = jax.device_put(state, jax.devices()[0])  # as in the training loop: the second step compiles nothing
        step = train_step.TrainStep(template, SupervisedTask(), tx)
        return cls(step, state, train_step.stack([batch]))

    def __call__(self) -> float:
        """Run a step and return its loss."""
        self.state, metrics = self.step(self.state, self.batches)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


class Theirs:
    """PEFT's side: one padded batch, or one conversation at a time."""

    def __init__(self, base: Path, adapter: Path, batches: list[dict[str, torch.Tensor]]):
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        self.model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        matrices, vectors = ([p for p in self.parameters if (p.ndim > 1) == wanted] for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0}]
        self.adam = torch.optim.AdamW(groups, lr=RATE, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2))
        self.batches = batches
        self.targets = torch.tensor(sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches))

    def __call__(self) -> float:
        """Run a step and return its loss."""
        self.adam.zero_grad()
        total = 0.0
        for batch in self.batches:
            loss = self.model(**batch, num_items_in_batch=self.targets).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parameters, OPTIMIZER.max_grad_norm)
        self.adam.step()
        return total


def measure(name: str, model: VLM, processor: Processor, base: Path, **options: Any) -> dict[str, Any]:
    """Return what `bench.result` gives for one kind of adapter. Raises AssertionError where losses differ.

    Args:
      options: of `bench.race`.
    """
    records = bench.conversations(16, seed=1)
    examples = [processor.encode(record) for record in records]
    adapted = attach(model, CASES[name])
    with tempfile.TemporaryDirectory() as folder:
        write_peft(extract(adapted), model.config, folder)
        padded = Theirs(base, Path(folder), [bench.torch_inputs(examples, processor)])
        singly = Theirs(base, Path(folder), [bench.torch_inputs([example], processor) for example in examples])
    ours = Ours.of(adapted, processor.pack(records, **bench.filled(examples, processor)))
    trained = sum(p.numel() for p in padded.parameters)
    assert trained == sum(value.size for value in ours.state.trainable.values()), "other parameters are trained"
    runners: dict[str, Callable[[], float]] = {"jvlm": ours, "padded": padded, "singly": singly}
    losses = {way: [run() for _ in range(STEPS_COMPARED)] for way, run in runners.items()}
    difference = max(abs(a - b) for a, b in zip(losses["jvlm"], losses["padded"], strict=True))
    assert difference < 1e-3, f"the losses of the first steps differ: {losses}"
    assert losses["jvlm"][-1] < losses["jvlm"][0], f"nothing is learned: {losses['jvlm']}"
    best = bench.race(**options, **runners)
    check = f"{trained:,} trained, losses of {STEPS_COMPARED} steps differ by {difference:.1e}"
    return bench.result(name, sum(e.length for e in examples), best, "tokens/s", check)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time, not what a clock shows")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        bench.make_checkpoint(base)
        model, processor = jvlm.load(base)
        count = sum(vlm.parameter_counts(model).values())
        versions = f"jax {jax.__version__}, torch {torch.__version__}, peft {peft.__version__}"
        print(f"{count / 1e6:.1f} M parameters, float32, {cores} cores, {platform.machine()}, {versions}")
        print(bench.HEADER, flush=True)
        results = []
        for name in arguments.only:
            results.append(measure(name, model, processor, base, rounds=arguments.rounds, clock=clock))
            print(bench.line(results[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

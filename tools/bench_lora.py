"""A training step of LoRA and DoRA: jvlm against PEFT + torch on this machine, one run, ratios.

Both sides start from the same adapter: jvlm makes it and writes the PEFT folder that PEFT trains. A step is forward,
backward, clipping and AdamW, in float32; the losses of the first steps must agree.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import peft
import torch

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
from tools.bench_model import conversations, filled, torch_inputs
from tools.bench_rounds import Clock, Result, race, timed

RATE, STEPS_COMPARED = 1e-3, 2
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

    def __init__(self, base: torch.nn.Module, adapter: Path, batches: list[dict[str, torch.Tensor]]):
        self.model = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter, is_trainable=True)
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


def measure(name: str, model: VLM, processor: Processor, oracle, *, clock: Clock, **limits: Any) -> Result:
    """Return the result for one of `CASES`. Raises AssertionError where losses differ.

    Args:
      oracle: the base in transformers.
      limits: of `race`.
    """
    records = conversations(16, seed=1)
    examples = [processor.encode(record) for record in records]
    adapted = attach(model, CASES[name])
    with tempfile.TemporaryDirectory() as folder:
        write_peft(extract(adapted), model.config, folder)
        padded = Theirs(oracle, Path(folder), [torch_inputs(examples, processor)])
        singly = Theirs(oracle, Path(folder), [torch_inputs([example], processor) for example in examples])
    ours = Ours.of(adapted, processor.pack(records, **filled(examples, processor)))
    trained = sum(p.numel() for p in padded.parameters)
    assert trained == sum(value.size for value in ours.state.trainable.values()), "other parameters are trained"
    runners = {"jvlm": ours, "padded": padded}
    losses = {way: [run() for _ in range(STEPS_COMPARED)] for way, run in runners.items()}
    difference = max(abs(a - b) for a, b in zip(losses["jvlm"], losses["padded"], strict=True))
    assert difference < 1e-3, f"the losses of the first steps differ: {losses}"
    assert losses["jvlm"][-1] < losses["jvlm"][0], f"nothing is learned: {losses['jvlm']}"
    rounds = race(timed(ours, clock), {"padded": timed(padded, clock), "singly": timed(singly, clock)}, **limits)
    check = f"{trained:,} trained, losses of {STEPS_COMPARED} steps differ by {difference:.1e}"
    return Result(name, sum(e.length for e in examples), "tokens/s", rounds, check)

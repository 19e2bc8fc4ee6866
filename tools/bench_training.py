"""A training step beside transformers + torch."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import torch

from jvlm.data.processor import Processor
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.training import optimizer, train_step
from jvlm.training.config import OptimizerConfig
from jvlm.training.state import TrainState
from jvlm.training.supervised import SupervisedTask
from jvlm.training.trainer import split
from tools.bench_model import conversations, filled, torch_inputs
from tools.bench_rounds import Clock, Result, race, timed


def train(model: VLM, processor: Processor, oracle, *, clock: Clock, **limits: Any) -> Result:
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

    oracle = copy.deepcopy(oracle).train()  # the other parts need it as it is
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

    ways = {
        "padded": timed(lambda: theirs("padded", [together]), clock),
        "singly": timed(lambda: theirs("singly", singly), clock),
    }
    rounds = race(timed(ours, clock), ways, **limits)
    difference = abs(first_loss["jvlm"] - first_loss["padded"])
    assert difference < 1e-3, f"the losses of the first step differ: {first_loss}"
    tokens = sum(e.length for e in examples)
    return Result("training step", tokens, "tokens/s", rounds, f"first losses differ by {difference:.1e}")

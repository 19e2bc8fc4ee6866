"""Run by test_adapters.py in a process with 8 CPU devices: a training step of adapters on shapes of meshes."""

from __future__ import annotations

import json
import math

import jax
import numpy as np

from jvlm.adapters.attach import attach
from jvlm.adapters.config import AdapterConfig
from jvlm.models import vlm
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training import compiled_step, starting_model, train_step, trainer
from tests.parallel import models

DORA = AdapterConfig(
    rank=4, use_dora=True, dropout=0.25, targets=("all-linear", "patch_embed", "embed", "head"), train_modules=()
)
EXPERTS = AdapterConfig(rank=4, targets=("decoder", "encoder", "connector"))
CASES = {"qwen2_5_vl": DORA, "idefics2": DORA, "mm1_5": EXPERTS}


def step(architecture: str, sizes: dict[str, int]) -> tuple[float, dict[str, np.ndarray], dict[str, int]]:
    """(loss, gradients, bytes of the optimizer's state in all and on one device) of the first step."""
    config = CASES[architecture]
    parallel = ParallelConfig(**{"data": 1, **sizes})
    experiment = models.experiment(architecture, parallel, adapter=config, gradient_accumulation_steps=2)
    planned = compiled_step.compile_step(experiment, jax.devices()[: math.prod(sizes.values())])
    model = starting_model.random_model(experiment.model, 0, planned.layout.parameter)
    model = attach(model, config, seed=1, sharding=planned.layout.parameter)
    values = {}
    for path, value in trainer.split(model)[1].items():
        if path.endswith(".adapter.b"):  # zeros have no gradient for the first matrix
            drawn = np.random.default_rng(len(path)).standard_normal(value.shape, np.float32) / 8
            value = jax.device_put(drawn, value.sharding)
        values[path] = value
    state = planned.init_state(values)
    batches = train_step.stack([models.batch(experiment.model), models.batch(experiment.model, seed=1)])
    batches = jax.device_put(batches, jax.tree.map(lambda x: x.sharding, planned.batches))
    state, metrics = planned.step(state, batches)
    (adam,) = [s for s in state.opt_state if hasattr(s, "mu")]
    assert adam.mu.keys() == {p for p in vlm.variables(model) if ".adapter." in p and not p.endswith("scale")}
    leaves = jax.tree.leaves(adam)
    sizes = {"all": sum(x.nbytes for x in leaves), "one": sum(x.addressable_shards[0].data.nbytes for x in leaves)}
    gradients = {path: np.asarray(m) / (1 - experiment.optimizer.beta1) for path, m in adam.mu.items()}
    return float(metrics["loss"]), gradients, sizes


def main(architecture: str, *names: str) -> None:
    """One JSON line for each mesh, after that of one device: largest differences from it."""
    expected = None
    for name in ("one", *names):
        loss, gradients, sizes = step(architecture, models.MESHES[name])
        expected = expected or (loss, gradients)
        differences = {p: float(np.abs(g - expected[1][p]).max()) for p, g in gradients.items()}
        path = max(differences, key=differences.get)
        line = {"mesh": name, "loss": loss, "loss_difference": abs(loss - expected[0]), "parameter": path}
        line |= {"gradient_difference": differences[path], "bytes": sizes}
        print(json.dumps(line | {"largest_gradient": max(float(np.abs(g).max()) for g in gradients.values())}))

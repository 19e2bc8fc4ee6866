"""Run by test_meshes.py in a process with 8 CPU devices: a step of preference training on shapes of meshes."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np

from jvlm.parallel.mesh import ParallelConfig
from jvlm.preference.pairs import PreferenceTask
from jvlm.training import compiled_step, starting_model, train_step, trainer
from tests.parallel import models

TASK = PreferenceTask(("sigmoid", "simpo"), sft_weight=1.0)


def step(architecture: str, sizes: dict[str, int]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(metrics, gradients) of the first step, of two micro-batches."""
    parallel = ParallelConfig(**{"data": 1, **sizes})
    experiment = models.experiment(architecture, parallel, task=TASK, gradient_accumulation_steps=2)
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, preference="pairs"))
    planned = compiled_step.compile_step(experiment, jax.devices()[: math.prod(sizes.values())])
    model = starting_model.random_model(experiment.model, 0, planned.layout.parameter)
    state = planned.init_state(trainer.split(model)[1])
    batches = train_step.stack([models.batch(experiment.model), models.batch(experiment.model, seed=1)])
    batches = jax.device_put(batches, jax.tree.map(lambda x: x.sharding, planned.batches))
    state, metrics = planned.step(state, batches)
    (adam,) = [s for s in state.opt_state if hasattr(s, "mu")]
    return {name: float(value) for name, value in metrics.items()}, {p: np.asarray(m) for p, m in adam.mu.items()}


def main(architecture: str, *names: str) -> None:
    """One JSON line for each mesh, after that of one device: metrics, and the largest differences of gradients."""
    expected = None
    for name in ("one", *names):
        metrics, gradients = step(architecture, models.MESHES[name])
        expected = expected or gradients
        difference = max(float(np.abs(g - expected[p]).max()) for p, g in gradients.items())
        largest = max(float(np.abs(g).max()) for g in gradients.values())
        print(json.dumps({"mesh": name, "metrics": metrics, "difference": difference, "largest": largest}))

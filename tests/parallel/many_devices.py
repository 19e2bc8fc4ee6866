"""Run by test_parallel.py in a process of its own with 8 CPU devices: one step on every shape of mesh."""

from __future__ import annotations

import json
import math
import sys
import time

import jax
import numpy as np

from jvlm.parallel.mesh import ParallelConfig
from jvlm.training import loop, program
from jvlm.training import step as stepping
from tests.parallel import models

MESHES = {
    "one": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "context": {"context": 8},
    "data_fsdp_tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp_context_tensor": {"fsdp": 2, "context": 2, "tensor": 2},
    "expert_fsdp": {"expert": 4, "fsdp": 2},
    "expert_context_tensor": {"expert": 2, "context": 2, "tensor": 2},
}


def step(architecture: str, sizes: dict[str, int]) -> tuple[float, dict[str, np.ndarray], str]:
    """(loss, gradients, compiled program) of one step."""
    config = ParallelConfig(**{"data": 1, **sizes})
    experiment = models.experiment(architecture, config)
    devices = jax.devices()[: math.prod(sizes.values())]
    planned = program.plan(experiment, devices)
    model = loop.random_model(experiment.model, 0, planned.layout.parameter)
    state, frozen = planned.begin(loop.split(model)[1])
    compiled = planned.lower().compile()
    batches = stepping.stack([models.batch(experiment.model)])
    batches = jax.device_put(batches, jax.tree.map(lambda x: x.sharding, planned.batches))
    state, metrics = compiled(state, frozen, batches)
    (adam,) = [s for s in state.optimizer if hasattr(s, "mu")]
    gradients = {path: np.asarray(m) / (1 - experiment.optimizer.beta1) for path, m in adam.mu.items()}
    return float(metrics["loss"]), gradients, compiled.as_text()


def main(architecture: str, *names: str) -> None:
    """One JSON line for each mesh: largest differences from one device."""
    expected = None
    for name in names or MESHES:
        began = time.perf_counter()
        loss, gradients, _ = step(architecture, MESHES[name])
        expected = expected or (loss, gradients)
        largest = max(np.abs(g).max() for g in expected[1].values())
        worst = {p: float(np.abs(g - expected[1][p]).max()) for p, g in gradients.items()}
        path = max(worst, key=worst.get)
        line = {"mesh": name, "loss": loss, "loss_difference": abs(loss - expected[0]), "gradient": worst[path]}
        seconds = round(time.perf_counter() - began, 1)
        print(json.dumps({**line, "parameter": path, "largest": float(largest), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

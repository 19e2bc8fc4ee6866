"""Run by test_meshes.py and every_mesh.py in a process with 8 CPU devices: one training step on shapes of meshes."""

from __future__ import annotations

import json
import math
import time

import jax
import numpy as np

from jvlm.parallel import collectives
from jvlm.parallel.mesh import ParallelConfig
from jvlm.training import compiled_step, starting_model, train_step, trainer
from tests.parallel import models


def step(architecture: str, sizes: dict[str, int]) -> tuple[float, dict[str, np.ndarray], list[str]]:
    """(loss, gradients, collectives) of one step. Gradients are read off Adam's first moments."""
    experiment = models.experiment(architecture, ParallelConfig(**{"data": 1, **sizes}))
    planned = compiled_step.compile_step(experiment, jax.devices()[: math.prod(sizes.values())])
    model = starting_model.random_model(experiment.model, 0, planned.layout.parameter)
    state = planned.init_state(trainer.split(model)[1])
    compiled = planned.lower().compile()
    batches = train_step.stack([models.batch(experiment.model)])
    batches = jax.device_put(batches, jax.tree.map(lambda x: x.sharding, planned.batches))
    state, metrics = compiled(*state.split(), batches)
    (adam,) = [s for s in state.opt_state if hasattr(s, "mu")]
    gradients = {path: np.asarray(m) / (1 - experiment.optimizer.beta1) for path, m in adam.mu.items()}
    return float(metrics["loss"]), gradients, collectives.listing(compiled.as_text(), planned.layout.mesh)


def main(architecture: str, *names: str) -> None:
    """One JSON line for each mesh: largest differences from the first, and the collectives."""
    expected = None
    for name in names:
        began = time.process_time()
        loss, gradients, sent = step(architecture, models.MESHES[name])
        expected = expected or (loss, gradients)
        differences = {p: float(np.abs(g - expected[1][p]).max()) for p, g in gradients.items()}
        path = max(differences, key=differences.get)
        line = {
            "mesh": name,
            "loss": loss,
            "loss_difference": abs(loss - expected[0]),
            "parameter": path,
            "gradient_difference": differences[path],
            "largest_gradient": float(np.abs(gradients[path]).max()),
            "collectives": sent,
            "seconds": round(time.process_time() - began, 1),
        }
        print(json.dumps(line), flush=True)

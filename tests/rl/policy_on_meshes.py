"""Run by test_meshes.py in a process with 8 CPU devices: a step of policy optimisation on shapes of meshes."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np

from jvlm.parallel.mesh import ParallelConfig
from jvlm.rl.losses import PolicyLoss
from jvlm.rl.task import PolicyBatch, PolicyTask, empty_batch
from jvlm.training import compiled_step, starting_model, train_step, trainer
from jvlm.training.config import Experiment
from tests.parallel import models

BANNED = [150, 151, 152]
LOSSES = {
    "on_policy": PolicyLoss(correction="token_truncate"),
    "gspo": PolicyLoss(kind="gspo", ratio_low=0.5, ratio_high=2.0, normalise="sequence"),
}


def batch(experiment: Experiment, seed: int) -> PolicyBatch:
    """A packed batch with advantages and log-probabilities drawn at random."""
    packed = models.batch(experiment.model, seed)
    # a picture's tokens are never sampled
    weights = np.where(packed.tokens < min(BANNED), packed.loss_weights, 0).astype(np.float32)
    packed = dataclasses.replace(packed, loss_weights=weights)
    policy, rng = empty_batch(packed), np.random.default_rng(seed)
    same = np.pad(packed.segment_ids[:, 1:] == packed.segment_ids[:, :-1], ((0, 0), (0, 1)))
    following = np.pad(packed.loss_weights[:, 1:], ((0, 0), (0, 1)))
    mask = (following > 0) & same
    policy.weights[:] = np.where(mask, 1e-3, 0)
    policy.advantages[:] = rng.standard_normal(mask.shape)
    policy.rollout[:] = policy.old[:] = np.where(mask, -5 + 0.1 * rng.standard_normal(mask.shape), 0)
    policy.is_first[:] = rng.random(mask.shape) < 0.1
    policy.banned[:, :, : len(BANNED)] = BANNED
    policy.share[0] = seed == 0
    return policy


def step(architecture: str, kind: str, sizes: dict[str, int]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(metrics, gradients) of the first step, of two micro-batches."""
    task = PolicyTask(policy_loss=LOSSES[kind])
    parallel = ParallelConfig(**{"data": 1, **sizes})
    experiment = models.experiment(architecture, parallel, task=task, gradient_accumulation_steps=2)
    planned = compiled_step.compile_step(experiment, jax.devices()[: math.prod(sizes.values())])
    model = starting_model.random_model(experiment.model, 0, planned.layout.parameter)
    state = planned.init_state(trainer.split(model)[1])
    batches = train_step.stack([batch(experiment, 0), batch(experiment, 1)])
    batches = jax.device_put(batches, jax.tree.map(lambda x: x.sharding, planned.batches))
    state, metrics = planned.step(state, batches)
    (adam,) = [s for s in state.opt_state if hasattr(s, "mu")]
    return {name: float(value) for name, value in metrics.items()}, {p: np.asarray(m) for p, m in adam.mu.items()}


def main(architecture: str, kind: str, *names: str) -> None:
    """One JSON line for each mesh, after that of one device: metrics, and the largest differences of gradients."""
    expected = None
    for name in ("one", *names):
        metrics, gradients = step(architecture, kind, models.MESHES[name])
        expected = expected or gradients
        difference = max(float(np.abs(g - expected[p]).max()) for p, g in gradients.items())
        largest = max(float(np.abs(g).max()) for g in gradients.values())
        print(json.dumps({"mesh": name, "metrics": metrics, "difference": difference, "largest": largest}))

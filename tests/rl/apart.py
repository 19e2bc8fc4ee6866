"""Run by test_meshes.py with CPU devices of its own: two steps of `jvlm rl` on the small policy of a folder, with the
engine on the devices that train or on others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jvlm.models import vlm
from jvlm.rl.run import train
from tests.rl.support import policy_experiment


def main(folder: str, drawing: int | None) -> None:
    """Train, and print on which devices the parameters are in the end."""
    experiment = policy_experiment(Path(folder), steps=2)
    rollout = dataclasses.replace(experiment.task.rollout, devices=drawing, slots=16)
    task = dataclasses.replace(experiment.task, rollout=rollout)
    data = dataclasses.replace(experiment.data, batch_size=4)
    result = train(dataclasses.replace(experiment, task=task, data=data))
    devices = {d.id for variable in vlm.parameters(result.model).values() for d in variable.get_value().devices()}
    print("trained on", sorted(devices))

"""On which devices a run draws answers, and on which it trains: on all of them in turn, or some for the one and the
others for the other, to which the weights are copied before each rollout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from jvlm.errors import UserError
from jvlm.inference import sharding
from jvlm.models import vlm
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.rl.config import RolloutConfig


@dataclasses.dataclass(frozen=True)
class EnginePlace:
    """Where the engine of this process has its parameters.

    Attributes:
      layout: the devices that share the work; None is one device.
      device: the first of them.
      is_apart: whether they train nothing.
    """

    layout: MeshLayout | None
    device: jax.Device
    is_apart: bool

    def model(self, model: VLM) -> VLM:
        """Return the trainer's model for the engine: as it is where the devices are the trainer's, and those of this
        process; else a copy. Every process must call it."""
        if jax.process_count() > 1:
            model = sharding.local_copy(model, self.layout, self.device)
        if not self.is_apart:
            return model
        values = {}
        for path, variable in vlm.variables(model).items():
            place = self.device if self.layout is None else self.layout.parameter(path, variable)
            values[path] = jax.device_put(variable.get_value(), place)
        return vlm.bind(model, values)


def training_layout(parallel: ParallelConfig, rollout: RolloutConfig) -> MeshLayout:
    """Return the mesh that a run trains on.

    Raises:
      UserError: no device is left to train, or the mesh does not fit those that are.
    """
    if rollout.devices is None:
        return MeshLayout.of(parallel)
    drawing = {device for process in range(jax.process_count()) for device in _drawing(rollout.devices, process)}
    return MeshLayout.of(parallel, [device for device in jax.devices() if device not in drawing])


def engine_place(config: VLMConfig, rollout: RolloutConfig) -> EnginePlace:
    """Return where the engine of this process is.

    Raises:
      UserError: no device is left to train.
    """
    is_apart = rollout.devices is not None
    devices = _drawing(rollout.devices, jax.process_index()) if is_apart else jax.local_devices()
    return EnginePlace(sharding.inference_layout(config, devices=devices), devices[0], is_apart)


def _drawing(count: int, process: int) -> Sequence[jax.Device]:
    """Return the last devices of a process."""
    devices = jax.local_devices(process_index=process)
    if count >= len(devices):
        raise UserError(
            f"task.rollout.devices = {count} of the {len(devices)} device(s) of a process draw answers, and none is "
            "left to train: take fewer, or leave it out to draw and train on all of them in turn"
        )
    return devices[-count:]

"""An optimizer as one optax transformation."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import optax
from flax import nnx

from jvlm.models.vlm import TOWERS
from jvlm.training.optimizer import schedules
from jvlm.training.optimizer.clipping import clip_by_tower_norm
from jvlm.training.optimizer.config import OptimizerConfig, matches
from jvlm.training.optimizer.directions import direction
from jvlm.training.optimizer.ema import track_ema


def make(config: OptimizerConfig, steps: int, variables: Mapping[str, nnx.Variable]) -> optax.GradientTransformation:
    """Return the transformation for the trainable parameters (path -> array) of a run of ``steps`` steps.

    Args:
      variables: the trainable parameters; their ``axes`` tell matrices from norms and biases.
    """
    decayed = {
        path: len(v.get_metadata()["axes"]) > 1 and not matches(path, config.no_decay) for path, v in variables.items()
    }
    peaks = {path: config.group_of(path)[1] for path in variables}
    by_tower = any(getattr(config, f"{tower}_max_grad_norm") is not None for tower in TOWERS)
    return optax.chain(
        *((clip_by_tower_norm(config),) if by_tower else ()),
        optax.clip_by_global_norm(config.max_grad_norm),
        direction(config, variables),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        scale_by_rates(schedules.factor(config, steps), peaks),
        *((track_ema(config.ema_decay),) if config.ema_decay is not None else ()),
    )


def scale_by_rates(factor: optax.Schedule, peaks: Mapping[str, float]) -> optax.GradientTransformation:
    """Return the transformation from steps to updates: times ``-factor(count) * peaks[path]``, for one count of all."""

    def init(params):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        share = factor(state.count)
        scaled = {path: (-peaks[path] * share * u).astype(u.dtype) for path, u in updates.items()}
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)

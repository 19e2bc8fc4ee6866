"""The learning rate over the steps, as a share of its peak.

Step n (from 0) has what transformers' schedule of the same name gives in step n + 1 of one step more, of which one more
is warm-up: its first step has a learning rate of 0 and changes nothing, which is left out here.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jvlm.training.optimizer.config import OptimizerConfig


def factor(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule of a run of ``steps`` steps: from the number of updates so far to a share of the peak."""
    warmup = config.warmup(steps)
    total = max(steps, warmup + 1)
    decay = total - warmup
    if config.schedule == "wsd":
        decay = min(decay, max(1, round(config.decay_ratio * steps)))
    shape = {"wsd": config.decay_shape, "constant": None}.get(config.schedule, config.schedule)

    def share(count):
        count = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((count - (total - decay)) / decay, 0.0, 1.0)
        after = config.min_lr_ratio + (1 - config.min_lr_ratio) * _remaining(shape, progress)
        return jnp.minimum((count + 1) / (warmup + 1), 1.0) * jnp.where(count < warmup, 1.0, after)

    return share


def _remaining(shape: str | None, progress):
    """Return what is left of 1 after a share ``progress`` of the decay."""
    if shape == "linear":
        return 1 - progress
    if shape == "cosine":
        return 0.5 * (1 + jnp.cos(jnp.pi * progress))
    if shape == "1-sqrt":
        return 1 - jnp.sqrt(progress)
    return jnp.ones_like(progress)

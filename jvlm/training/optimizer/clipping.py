"""Gradient norms of towers, and limits on them."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from jvlm.models.vlm import TOWERS
from jvlm.training.optimizer.config import OptimizerConfig, tower_of


def tower_norms(gradients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the gradient norm of each tower with trainable parameters."""
    present = [t for t in TOWERS if any(tower_of(p) == t for p in gradients)]
    return {t: optax.tree.norm([g for p, g in gradients.items() if tower_of(p) == t]) for t in present}


def clip_by_tower_norm(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return the transformation that scales the gradient of each tower with a limit down to it."""
    limits = {tower: getattr(config, f"{tower}_max_grad_norm") for tower in TOWERS}

    def update(gradients, _):
        scales = {
            tower: jnp.minimum(1.0, limits[tower] / jnp.maximum(norm, 1e-30))
            for tower, norm in tower_norms(gradients).items()
            if limits[tower] is not None
        }
        return {p: g * scales[tower_of(p)] if tower_of(p) in scales else g for p, g in gradients.items()}

    return optax.stateless(update)

"""Steps from gradients, before weight decay and learning rate: AdamW, Muon, Lion and Adafactor, as optax has them.

Dimensions of a parameter before those that its ``axes`` name count layers. Each layer, and each expert, is a matrix of
its own, as it is where frameworks store them apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

from jvlm.training.optimizer.config import OptimizerConfig
from jvlm.training.optimizer.eight_bit import scale_by_adam_8bit


def direction(config: OptimizerConfig, variables: Mapping[str, nnx.Variable]) -> optax.GradientTransformation:
    """Return the transformation from gradients to steps."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    if config.kind == "adamw":
        return adam
    if config.kind == "adamw_8bit":
        return scale_by_adam_8bit(config.beta1, config.beta2, config.eps, variables)
    if config.kind == "lion":
        return optax.scale_by_lion(config.beta1, config.beta2)
    if config.kind == "adafactor":
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=config.adafactor_decay),
            _clip_by_matrix_rms(config.adafactor_clip, variables),
        )
    return _muon(config, variables, adam)


def _muon(
    config: OptimizerConfig, variables: Mapping[str, nnx.Variable], adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    kinds = {path: "muon" if _is_matrix(v) else "adam" for path, v in variables.items()}

    def matrices(updates):
        numbers = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return {path: numbers if kinds[path] == "muon" else optax.MaskedNode() for path in updates}

    muon = optax.chain(
        contrib.scale_by_muon(beta=config.muon_beta, weight_dimension_numbers=matrices),
        optax.stateless_with_tree_map(lambda update, _: 0.2 * max(update.shape[-2:]) ** 0.5 * update),
    )
    return optax.partition({"muon": muon, "adam": adam}, kinds)


def _is_matrix(variable: nnx.Variable) -> bool:
    """Whether a parameter maps one space of features to another; a table of embeddings does not."""
    axes = variable.get_metadata()["axes"]
    return len(axes) > 1 and not {"vocab", "position"} & set(axes)


def _clip_by_matrix_rms(limit: float, variables: Mapping[str, nnx.Variable]) -> optax.GradientTransformation:
    """Scale down the step of each matrix, norm or bias whose root mean square is above the limit."""
    own = {}
    for path, variable in variables.items():
        axes = variable.get_metadata()["axes"]
        own[path] = tuple(range(-len([axis for axis in axes if axis != "experts"]), 0))

    def clipped(path: str, update: jax.Array) -> jax.Array:
        rms = jnp.sqrt(jnp.mean(update**2, axis=own[path], keepdims=True))
        return update / jnp.maximum(1.0, rms / limit)

    return optax.stateless(lambda updates, _: {path: clipped(path, u) for path, u in updates.items()})

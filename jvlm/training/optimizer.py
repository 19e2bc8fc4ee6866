"""AdamW or Muon, with a learning rate for each tower. A tower at 0 is frozen: it takes no part in the gradient."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax
from flax import nnx
from optax import contrib

from jvlm.models.vlm import TOWERS
from jvlm.training.config import OptimizerConfig


def tower_of(path: str) -> str:
    """The tower of a dotted parameter path."""
    return path.partition(".")[0]


def schedule(config: OptimizerConfig, tower: str, steps: int) -> optax.Schedule:
    """Linear warm-up to the tower's peak, then cosine decay over the rest of the steps."""
    peak, warmup = config.rate_of(tower), round(config.warmup_ratio * steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=peak * config.min_lr_ratio,
    )


def make(config: OptimizerConfig, steps: int, variables: Mapping[str, nnx.Variable]) -> optax.GradientTransformation:
    """Return the transformation for the trainable parameters (path -> array).

    Args:
      variables: the trainable parameters; their ``axes`` tell matrices from norms and biases.
    """
    decayed = {path: len(v.get_metadata()["axes"]) > 1 for path, v in variables.items()}
    towers = {path: tower_of(path) for path in variables}
    rates = {t: optax.scale_by_learning_rate(schedule(config, t, steps)) for t in TOWERS}
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        _direction(config, variables),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.partition(rates, towers),
    )


def _direction(config: OptimizerConfig, variables: Mapping[str, nnx.Variable]) -> optax.GradientTransformation:
    """Steps from gradients, before decay and learning rate."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    if config.kind == "adamw":
        return adam
    kinds = {path: "muon" if _is_matrix(v) else "adam" for path, v in variables.items()}

    def matrices(updates):
        # axes before the last two count layers or experts, each with a matrix of its own
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


def tower_norms(gradients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the gradient norm of each tower with trainable parameters."""
    present = [t for t in TOWERS if any(tower_of(p) == t for p in gradients)]
    return {t: optax.tree.norm([g for p, g in gradients.items() if tower_of(p) == t]) for t in present}

"""Which tensors of a model hold NaN or infinity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jvlm import families
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.weights import table


class BrokenWeights(table.WeightError):
    """Weights that are not finite numbers: no input gets an answer from them."""


def not_finite(model: VLM) -> list[str]:
    """Return a line for each tensor with values that are not finite, and how many.

    Names are those of the family's checkpoints, or parameter paths where it has none. Every parameter is read once,
    where it lies.
    """
    form = families.get(model.config.family).hf
    rules = {rule.path: rule for rule in form.rules(model.config)} if form else {}
    lines = []
    for path, variable in vlm.variables(model).items():
        bad = np.asarray(_bad(variable.get_value()))
        rule, of = rules.get(path), variable.get_value().size
        if not bad.any():
            continue
        if rule is None or not rule.layered:
            lines.append(f"{rule.name if rule else path}: {bad.sum()} of {of} values")
        else:
            layers = [(rule.first + n * rule.step, count) for n, count in enumerate(bad) if count]
            lines += [f"{rule.name.replace('{i}', str(n))}: {c} of {of // len(bad)} values" for n, c in layers]
    return lines


@jax.jit
def _bad(value: jax.Array) -> jax.Array:
    """Values that are not finite, for each entry of the first axis, which in stacked parameters is the layer."""
    return jnp.sum(~jnp.isfinite(value), axis=tuple(range(1, value.ndim)), dtype=jnp.int32)

"""Adapters that change what a model answers, without training."""

import jax.numpy as jnp
import numpy as np

from jvlm.adapters.attach import attach, extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.weights import AdapterWeights
from jvlm.models import vlm
from jvlm.models.vlm import VLM


def random_adapter(model: VLM, seed: int, targets: tuple[str, ...] = ("decoder",), **config) -> AdapterWeights:
    """Return an adapter whose second matrices, zeros at first, are normally distributed."""
    attached = attach(model, AdapterConfig(targets=targets, **config), seed=seed)
    rng = np.random.default_rng(seed)
    values = {path: variable.get_value() for path, variable in vlm.variables(attached).items()}
    for path, value in values.items():
        if path.endswith(".adapter.b"):
            values[path] = jnp.asarray(0.3 * rng.standard_normal(value.shape, np.float32))
    return extract(vlm.bind(attached, values))

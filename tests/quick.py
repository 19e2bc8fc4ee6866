"""Small models without a compiler where none is needed, and in one program where one is.

Drawing parameters operation by operation, or calling a model so, compiles dozens of tiny programs: seconds of a test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jvlm.models import vlm


def random_module(build: Callable[[], Any], seed: int = 0) -> Any:
    """Return the module that ``build`` makes, with parameters that numpy draws.

    Matrices keep the scale of what they multiply; scales lie about one, biases about zero, and gates are zero.
    """
    graph, state = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(seed)

    def drawn(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        name, shape = str(path[-1]), variable.get_value().shape
        value = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("_gate"):
            value = np.zeros(shape, np.float32)
        elif name in ("scale", "bias"):
            value = 0.1 * value + (name == "scale")
        elif name == "embedding":
            value /= np.sqrt(shape[-1])
        elif len(shape) > 1:
            value /= np.sqrt(shape[-2])
        return variable.replace(jnp.asarray(value, variable.get_value().dtype))

    return nnx.merge(graph, nnx.from_flat_state([(path, drawn(path, v)) for path, v in nnx.to_flat_state(state)]))


def random_model(config: vlm.VLMConfig, seed: int = 0) -> vlm.VLM:
    """Return a model of this configuration by `random_module`."""
    return random_module(lambda: vlm.VLM(config, rngs=nnx.Rngs(0)), seed)


def call(function: Callable[..., Any], module: Any, *arguments: Any) -> Any:
    """Return ``function(module, *arguments)``, compiled as one program.

    It is traced at each call, so that it may read what is set around it, such as the adapters that are chosen.
    """
    graph, state = nnx.split(module)
    return jax.jit(lambda state, *rest: function(nnx.merge(graph, state), *rest))(state, *arguments)


def logits(model: vlm.VLM, batch: Any) -> np.ndarray:
    """Return the logits of every token, by `call`."""
    return np.asarray(call(lambda model, batch: model.decoder.logits(model.hidden(batch).hidden), model, batch))

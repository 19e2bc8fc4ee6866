"""Parameters as decoding wants them: on CPU, stacked layers as one array per layer, without a copy."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from jvlm.models.layer_stack import LayerStack


def decoding_state(module: nnx.Module) -> nnx.State:
    """The module's state; on CPU, every stacked parameter of a `LayerStack` as a tuple of views, one per layer.

    A slice of a stacked array inside ``jit`` copies that layer's weights for every token on CPU. The views share
    memory with the module's parameters and keep it alive.
    """
    stacks = [path for path, part in nnx.iter_modules(module) if isinstance(part, LayerStack)]
    flat = []
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        value = variable.get_value()
        if _on_one_cpu(value) and any(path[: len(stack)] == stack for stack in stacks):
            variable = variable.replace(_views(value))
        flat.append((path, variable))
    return nnx.from_flat_state(flat)


def _on_one_cpu(value: Any) -> bool:
    return (
        isinstance(value, jax.Array) and {d.platform for d in value.devices()} == {"cpu"} and len(value.devices()) == 1
    )


def _views(stacked: jax.Array) -> tuple[jax.Array, ...]:
    host = np.asarray(stacked)
    (device,) = stacked.devices()
    # may_alias copies a slice only if it is not aligned as XLA wants it
    return tuple(jax.device_put(layer, device, may_alias=True) for layer in host)

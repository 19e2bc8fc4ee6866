"""What a pass needs beside the parameters: norms of DoRA's columns, once for a whole step, and keys for dropout."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jvlm.adapters.base_matrices import adapter_of, module_of
from jvlm.adapters.layers import LowRankAdapter, StepValue, column_norm
from jvlm.adapters.plan import AdapterPlan
from jvlm.models.layers import StoredKernel
from jvlm.models.vlm import VLM

Norms = dict[str, Array]


def norms(model: VLM) -> Norms:
    """Return path of the parameter -> length of the columns of the adapted matrices, for all DoRA adapters.

    No gradient flows through them, and they depend on nothing in a batch, so a step computes them once.
    """
    groups = model.adapters.groups if isinstance(model.adapters, AdapterPlan) else ()
    with jax.named_scope("dora_norm"):
        return {group.path: _norm(model, group.path) for group in groups if group.magnitude}


def _norm(model: VLM, path: str) -> Float[Array, "*L o"]:
    module = module_of(model, path)
    adapter, kernel = module.adapter, module.embedding if path.endswith(".embedding") else module.kernel
    graph, adapter_state = nnx.split(adapter)
    if isinstance(kernel, StoredKernel):
        kernel_graph, kernel_state = nnx.split(kernel)
        stacked, read = len(kernel.stacked_shape) > 2, lambda state: nnx.merge(kernel_graph, state).weight(jnp.float32)
    else:
        kernel_state = kernel[...]
        stacked, read = kernel_state.ndim > 2, lambda value: value

    def one(states: tuple[Any, nnx.State]) -> Array:
        return column_norm(read(states[0]), nnx.merge(graph, states[1]))

    # a layer after the other, so that no more than one is in float32 at a time
    return jax.lax.map(one, (kernel_state, adapter_state)) if stacked else one((kernel_state, adapter_state))


def prepare(model: VLM, norms: Mapping[str, Array], rng: PRNGKeyArray | None = None) -> VLM:
    """Give a model's adapters their norms, and with a key their dropout; changes the model in place and returns it.

    Args:
      rng: of this pass; None drops nothing.
    """
    for group in model.adapters.groups if isinstance(model.adapters, AdapterPlan) else ():
        adapter: LowRankAdapter = adapter_of(model, group.path)
        if group.path in norms:
            adapter.norm = nnx.data(StepValue(norms[group.path]))
        if rng is not None and adapter.dropout:
            keys = jax.random.split(jax.random.fold_in(rng, zlib.crc32(group.path.encode())), math.prod(group.lead))
            data = jax.random.key_data(keys)
            adapter.key = nnx.data(StepValue(data.reshape(*group.lead, *data.shape[1:])))
    return model


def with_norms(model: VLM) -> VLM:
    """Return the model with the norms of its DoRA adapters computed; itself where it has none."""
    plan = model.adapters
    if not isinstance(plan, AdapterPlan) or not any(group.magnitude for group in plan.groups):
        return model
    graph, state = nnx.split(model)
    columns = jax.jit(lambda state: norms(nnx.merge(graph, state)))(state)
    return prepare(nnx.merge(graph, state), columns)

"""Layers of equal shape, run one after the other: by a scan over stacked parameters, or unrolled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jvlm_kernels import RESIDUAL_NAMES

from jvlm.models.layers import RematPolicy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerLayer:
    """A value for each layer of a stack: a pytree.

    Attributes:
      values: arrays with a leading axis of layers where ``is_stacked``, else a tuple with the value of each layer.
      depth: number of layers.
    """

    values: Any
    depth: int = dataclasses.field(metadata={"static": True})
    is_stacked: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, values: Sequence[Any]) -> PerLayer:
        """Return separate values."""
        return cls(tuple(values), len(values), False)

    def __len__(self) -> int:
        return self.depth

    def __getitem__(self, layer: int) -> Any:
        if not -self.depth <= layer < self.depth:
            raise IndexError(f"layer {layer} of {self.depth}")
        return jax.tree.map(lambda value: value[layer], self.values) if self.is_stacked else self.values[layer]

    def __iter__(self) -> Iterator[Any]:
        return (self[layer] for layer in range(self.depth))

    def stacked(self) -> Any:
        """Return the values with a leading axis of layers."""
        return self.values if self.is_stacked else jax.tree.map(lambda *values: jnp.stack(values), *self.values)


class LayerStack(nnx.Module):
    """``depth`` layers of equal shape; their parameters have a leading axis of layers.

    A parameter may also hold a tuple with the array of each layer (`jvlm.inference.weights`). Callers need not know.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs):
        self.depth = depth
        self.layer = nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), depth))

    def __call__(
        self,
        body: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
        carry: Any,
        per_layer: Any = None,
        *,
        remat: RematPolicy,
        unroll: bool = False,
    ) -> tuple[Any, PerLayer]:
        """Return the last carry and the outputs of all layers of ``carry, output = body(layer, carry, value)``.

        One scan runs the layers, rematerialised as ``remat`` says. Where parameters or ``per_layer`` are separate, or
        ``unroll`` asks for it, the layers are unrolled instead: a step of decoding then reads each weight without
        copying it out of the stack, and compiles layer by layer. Outputs are then separate too.

        Args:
          per_layer: a `PerLayer`, numpy or jax arrays with a leading axis of layers, or None. Where layers are
            unrolled, entries of numpy arrays are numbers and arrays of numpy.
        """
        if not isinstance(per_layer, PerLayer):
            per_layer = PerLayer(per_layer, self.depth, True)
        if len(per_layer) != self.depth:
            raise ValueError(f"values of {len(per_layer)} layers for a stack of {self.depth}")
        graph, state = nnx.split(self.layer)

        def step(carry, inputs):
            layer_state, value = inputs
            return body(nnx.merge(graph, layer_state), carry, value)

        if per_layer.is_stacked and not unroll and not _is_separate(state):
            carry, outputs = jax.lax.scan(_rematerialise(step, remat), carry, (state, per_layer.values))
            return carry, PerLayer(outputs, self.depth, True)
        outputs = []
        for layer, value in enumerate(per_layer):
            carry, output = step(carry, (_parameters_of(state, layer), value))
            outputs.append(output)
        return carry, PerLayer.of(outputs)


def _parameters_of(state: nnx.State, layer: int) -> nnx.State:
    return jax.tree.map(lambda value: value[layer], state, is_leaf=lambda v: isinstance(v, tuple))


def _is_separate(state: nnx.State) -> bool:
    leaves = jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, tuple))
    return any(isinstance(leaf, tuple) for leaf in leaves)


def _rematerialise(step: Callable, policy: RematPolicy) -> Callable:
    if policy == "none":
        return step
    attention = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policies = {
        "full": None,
        "dots": jax.checkpoint_policies.save_from_both_policies(products, attention),
        "attention": attention,
    }
    return jax.checkpoint(step, policy=policies[policy], prevent_cse=False)

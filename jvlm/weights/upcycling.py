"""Experts from a dense model: sparse upcycling, arXiv 2212.05055."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.vlm import VLM
from jvlm.weights import hf

_LAYER = "decoder.blocks.layer."
_EXPERT_PARTS = ("gate", "up", "down")


def upcycle(model: VLM, experts: MoEConfig, *, seed: int = 0, sharding: hf.ShardingOf | None = None) -> VLM:
    """Return a dense model with the MLP of every ``experts.every``-th decoder layer as each of its experts' start.

    All experts are equal and the router is new, so the model computes what it did before, and training tells the
    experts apart.

    Args:
      sharding: of a parameter, from its path and variable, as experts take many times the room; None leaves it to XLA.

    Raises:
      UserError: the model has experts already, experts of another width than its MLPs, or gates that do not sum to 1.
    """
    dense = model.config.decoder
    if dense.mlp is not None:
        raise UserError(f"the decoder has {type(dense.mlp).__name__} in place of MLPs already")
    if experts.intermediate_size != dense.intermediate_size:
        raise UserError(
            f"experts.intermediate_size {experts.intermediate_size} must be that of the dense MLPs, "
            f"{dense.intermediate_size}"
        )
    if not experts.renormalise:
        raise UserError("without renormalise the gates sum to less than 1: the model would no longer be the same")
    config = dataclasses.replace(model.config, decoder=dataclasses.replace(dense, mlp=experts))
    target = vlm.abstract(config)
    old = {path: variable.get_value() for path, variable in vlm.parameters(model).items()}
    variables = vlm.parameters(target)

    def values(old: dict[str, jax.Array]) -> dict[str, jax.Array]:
        new = {}
        for path, variable in variables.items():
            shape = variable.get_value().shape
            if path.endswith(".mlp.router"):
                keys = jax.random.split(jax.random.key(seed), shape[0])
                new[path] = jnp.stack([config.precision.init_weight(key, shape[1:], shape[1]) for key in keys])
            else:
                new[path] = _from_dense(path, shape, old, dense.pattern_length, config.decoder.pattern_length)
        return new

    shardings = {path: sharding(path, v) for path, v in variables.items()} if sharding else None
    return vlm.bind(target, jax.jit(values, out_shardings=shardings)(old))


def _from_dense(path: str, shape: tuple[int, ...], old: dict[str, jax.Array], before: int, after: int) -> jax.Array:
    """Return a parameter made of the dense model's.

    Args:
      before, after: length of the layer pattern of the dense model, and of the new one, which ``before`` divides.
    """
    if not path.startswith(_LAYER):
        return old[path]
    rest, index = path.removeprefix(_LAYER), 0
    if after > 1:  # the layers of a pattern lie apart: pattern.N.
        _, number, rest = rest.split(".", 2)
        index = int(number)
    source = f"{_LAYER}pattern.{index % before}." if before > 1 else _LAYER
    layers = slice(index // before, None, after // before)
    part = rest.removeprefix("mlp.")
    if part in _EXPERT_PARTS:
        return jnp.broadcast_to(old[f"{source}mlp.{part}.kernel"][layers][:, None], shape)
    return old[source + rest][layers]

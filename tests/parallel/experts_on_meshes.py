"""Run by test_experts.py in a process of its own with 8 CPU devices: a layer of experts on meshes that split them."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jvlm.models import device_ops, registry
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.layers import Precision
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.parallel.sharded_ops import ShardedOps

B, S, D = 8, 6, 16
MESHES = {
    "expert x fsdp": ParallelConfig(data=1, expert=4, fsdp=2),
    "expert x context x tensor": ParallelConfig(data=1, expert=2, context=2, tensor=2),
    "experts over tensor, rows over data": ParallelConfig(
        data=4, tensor=2, override=("experts=tensor", "mlp=", "batch=data")
    ),
}


def run(graph, config, state, x, segments, d_y):
    """(y, report) and gradients of <y, d_y> + 100 loss, on the mesh of a configuration; None is one device."""
    layout = None if config is None else MeshLayout.of(config)

    @jax.jit
    def step(state, x, segments, d_y):
        def total(state, x):
            with device_ops.use(ShardedOps(layout) if layout else device_ops.LocalOps()):
                y, report = nnx.merge(graph, state)(x, segments)
            return jnp.sum(y * d_y) + 100 * report["loss"], (y, report)

        (_, found), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(state, x)
        return found, grads

    if layout:
        rows = functools.partial(layout.sharding, ("batch", "sequence", None))
        state = jax.tree.map(
            lambda v: v.replace(jax.device_put(v.get_value(), layout.parameter("experts", v))),
            state,
            is_leaf=lambda v: isinstance(v, nnx.Variable),
        )
        x, d_y = (jax.device_put(a, rows((B, S, D))) for a in (x, d_y))
        segments = jax.device_put(segments, layout.sharding(("batch", "sequence"), (B, S)))
    return jax.tree.map(np.asarray, step(state, x, segments, d_y))


def main() -> None:
    """One JSON line for each mesh: largest differences from one device."""
    rng = np.random.default_rng(0)
    x, d_y = (rng.normal(size=(B, S, D)).astype(np.float32) for _ in range(2))
    segments = rng.integers(0, 3, (B, S)).astype(np.int32)
    for capacity in (None, 4.0):
        config = MoEConfig(experts=8, intermediate_size=8, capacity_factor=capacity)
        precision = Precision(compute_dtype="float32", initializer_range=None)
        graph, state = nnx.split(registry.build(config, width=D, precision=precision, rngs=nnx.Rngs(0)))
        expected = run(graph, None, state, x, segments, d_y)
        for name, mesh in MESHES.items():
            found = run(graph, mesh, state, x, segments, d_y)
            differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found, expected)
            line = {"mesh": name, "capacity": capacity, "difference": max(jax.tree.leaves(differences))}
            print(json.dumps({**line, "largest": float(np.abs(expected[0][0]).max())}), flush=True)


if __name__ == "__main__":
    main()

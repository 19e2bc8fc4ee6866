"""Run by test_recipes.py in a process with 8 CPU devices: updates of every optimizer, and NEFTune's noise."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jvlm.models.device_ops import LocalOps
from jvlm.parallel.layout import MeshLayout
from jvlm.parallel.mesh import ParallelConfig
from jvlm.parallel.sharded_ops import ShardedOps
from jvlm.training import optimizer
from jvlm.training.neftune import EmbeddingNoise
from jvlm.training.optimizer.config import OptimizerConfig
from tests.parallel import models

SHAPES = {
    "encoder.patch_embed.kernel": ((96, 64), ("patch", "embed")),
    "connector.up.kernel": ((2, 128, 1024), ("embed", "mlp")),
    "connector.down.kernel": ((2, 1024, 128), ("mlp", "embed")),
    "decoder.embedding": ((256, 64), ("vocab", "embed")),
    "decoder.head.kernel": ((64, 256), ("embed", "vocab")),
    "decoder.norm.scale": ((64,), ("norm",)),
}
KINDS = ("adamw_8bit", "adafactor", "adamw", "lion", "muon")


def updates(kind: str, layout: MeshLayout) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(updates and averages of the second step, bytes of the optimizer's state in all and on one device)."""
    config = OptimizerConfig(kind=kind, ema_decay=0.9, decoder_max_grad_norm=1.0, learning_rate=1.0)
    rng = np.random.default_rng(0)
    draw = lambda: {p: rng.normal(size=s).astype(np.float32) for p, (s, _) in SHAPES.items()}  # noqa: E731
    values = draw()
    variables = {p: nnx.Param(jax.ShapeDtypeStruct(v.shape, v.dtype), axes=SHAPES[p][1]) for p, v in values.items()}
    tx = optimizer.make(config, 10, variables)
    shardings = layout.parameters(variables)
    of_state = layout.optimizer(jax.eval_shape(tx.init, values), variables)
    params = jax.device_put(values, shardings)
    state = jax.jit(tx.init, out_shardings=of_state)(params)
    step = jax.jit(tx.update, out_shardings=(shardings, of_state))
    for _ in range(2):
        found, state = step(jax.device_put(draw(), shardings), state, params)
    leaves = jax.tree.leaves(state)
    sizes = {"all": sum(x.nbytes for x in leaves), "one": sum(x.addressable_shards[0].data.nbytes for x in leaves)}
    averages = {f"average of {p}": v for p, v in optimizer.ema_of(state, params).items()}
    return {p: np.asarray(v) for p, v in {**found, **averages}.items()}, sizes


def noise(layout: MeshLayout) -> np.ndarray:
    """NEFTune's noise on a batch that the mesh splits."""
    packed = models.batch(models.qwen2_5_vl())
    batch = jax.device_put(packed, layout.batch(packed))

    @jax.jit
    def added(batch):
        zeros = jnp.zeros((*batch.tokens.shape, 64))
        return EmbeddingNoise(jax.random.key(0), 5.0).of_text(zeros, batch)

    return np.asarray(added(batch))


def loss_by_group(layout: MeshLayout) -> np.ndarray:
    """Sums of losses and of right answers of 5 groups of tokens, and the norm of the hidden states' gradient."""
    rng = np.random.default_rng(1)
    hidden, kernel = rng.normal(size=(8, 64, 32)).astype(np.float32), rng.normal(size=(32, 128)).astype(np.float32)
    targets, groups = rng.integers(0, 128, (8, 64)), rng.integers(-1, 5, (8, 64))
    weights = rng.choice([0.0, 0.5, 1.0], (8, 64)).astype(np.float32)

    @jax.jit
    def sums(hidden):
        ops = ShardedOps(layout) if layout.mesh.size > 1 else LocalOps()
        found = ops.cross_entropy_sum(
            hidden,
            jnp.asarray(kernel),
            jnp.asarray(targets),
            jnp.asarray(weights),
            groups=jnp.asarray(groups),
            num_groups=5,
        )
        return found.loss, found.by_group

    (_, by_group), gradient = jax.value_and_grad(sums, has_aux=True)(jnp.asarray(hidden))
    return np.append(np.asarray(by_group), np.linalg.norm(gradient))


def main(meshes: tuple[str, ...], kinds: tuple[str, ...]) -> None:
    """One JSON line for each mesh and optimizer, and for the noise on each mesh; the first mesh is one device."""
    expected = {}
    for name in ("one", *meshes):
        sizes = {"data": 1, **models.MESHES[name]}
        layout = MeshLayout.of(ParallelConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
        layout = dataclasses.replace(layout, max_replicated_mib=1e3)
        drawn = noise(layout)
        expected.setdefault("noise", drawn)
        print(json.dumps({"mesh": name, "kind": "noise", "equal": bool(np.array_equal(drawn, expected["noise"]))}))
        sums = loss_by_group(layout)
        first = expected.setdefault("loss", sums)
        print(json.dumps({"mesh": name, "kind": "loss", "equal": bool(np.allclose(sums, first, rtol=1e-5))}))
        for kind in kinds:
            found, bytes_of = updates(kind, layout)
            first = expected.setdefault(kind, found)
            worst = {p: float(np.abs(v - first[p]).max() / np.abs(first[p]).max()) for p, v in found.items()}
            print(json.dumps({"mesh": name, "kind": kind, "difference": worst, "bytes": bytes_of}), flush=True)

"""Muon: against its definition in float64 and against torch's; which parameters it moves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from jvlm.errors import UserError
from jvlm.training import optimizer
from jvlm.training.config import OptimizerConfig

MATRICES = {
    "decoder.blocks.layer.mlp.up.kernel": ((2, 8, 12), ("embed", "mlp")),  # of two layers
    "decoder.blocks.layer.mlp.experts.up": ((2, 3, 8, 12), ("experts", "embed", "mlp")),
    "encoder.patch_embed.kernel": ((24, 8), ("patch", "embed")),
}
OTHERS = {
    "decoder.embedding": ((16, 8), ("vocab", "embed")),
    "decoder.head.kernel": ((8, 16), ("embed", "vocab")),
    "encoder.positions": ((9, 8), ("position", "embed")),
    "decoder.norm.scale": ((8,), ("norm",)),
}
SHAPES = {**MATRICES, **OTHERS}
CONFIG = OptimizerConfig(
    kind="muon", learning_rate=0.1, warmup_ratio=0.0, min_lr_ratio=1.0, weight_decay=0.1, max_grad_norm=1e9
)


def numbers(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, (shape, _) in SHAPES.items()}


def moved(config: OptimizerConfig, steps: int) -> dict[str, np.ndarray]:
    """Parameters after so many updates, each with gradients of its own."""
    params = {path: jnp.asarray(x) for path, x in numbers(0).items()}
    variables = {path: nnx.Param(params[path], axes=axes) for path, (_, axes) in SHAPES.items()}
    tx = optimizer.make(config, 10, variables)

    @jax.jit
    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return state, optax.apply_updates(params, updates)

    state = jax.jit(tx.init)(params)
    for number in range(1, steps + 1):
        state, params = step(numbers(number), state, params)
    return {path: np.asarray(x) for path, x in params.items()}


def orthogonalised(x: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz steps on each matrix; the polynomial is odd, so the side of the products does not matter."""
    x = x / np.linalg.norm(x, axis=(-2, -1), keepdims=True)
    for _ in range(5):
        a = np.swapaxes(x, -2, -1) @ x
        x = 3.4445 * x + x @ (-4.7750 * a + 2.0315 * a @ a)
    return x


def defined(path: str, steps: int) -> np.ndarray:
    """A parameter after so many updates, by the formulas, in float64."""
    x, first, second = numbers(0)[path].astype(np.float64), 0.0, 0.0
    rate, config = CONFIG.learning_rate, CONFIG
    for t in range(1, steps + 1):
        g = numbers(t)[path].astype(np.float64)
        if path in MATRICES:
            beta = config.muon_beta
            first = beta * first + (1 - beta) * g
            ahead = beta * first / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
            update = 0.2 * np.sqrt(max(x.shape[-2:])) * orthogonalised(ahead)
        else:
            first = config.beta1 * first + (1 - config.beta1) * g
            second = config.beta2 * second + (1 - config.beta2) * g * g
            spread = np.sqrt(second / (1 - config.beta2**t)) + config.eps
            update = first / (1 - config.beta1**t) / spread
        decay = config.weight_decay if x.ndim > 1 else 0.0
        x = x - rate * (update + decay * x)
    return x


@pytest.mark.parametrize("steps", [1, 3])
def test_muon_moves_matrices_and_adamw_the_rest_as_defined(steps):
    found = moved(CONFIG, steps)
    for path in SHAPES:
        np.testing.assert_allclose(found[path], defined(path, steps), rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("path", ["decoder.blocks.layer.mlp.up.kernel", "encoder.patch_embed.kernel"])
def test_the_first_step_is_torchs(path):
    """torch computes the iteration in bfloat16."""
    found = moved(CONFIG, 1)[path].reshape(-1, *SHAPES[path][0][-2:])
    before, gradients = (numbers(seed)[path].reshape(found.shape) for seed in (0, 1))
    for layer in range(len(found)):
        weight = torch.nn.Parameter(torch.tensor(before[layer]))
        weight.grad = torch.tensor(gradients[layer])
        torch.optim.Muon([weight], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
        expected = weight.detach().numpy() - before[layer]
        np.testing.assert_allclose(found[layer] - before[layer], expected, atol=0.04 * np.abs(expected).max())


def test_a_muon_update_has_the_size_of_adamws_whatever_the_shape():
    before, after = (
        numbers(0),
        moved(OptimizerConfig(kind="muon", learning_rate=1.0, warmup_ratio=0.0, weight_decay=0.0), 1),
    )
    for path in MATRICES:
        assert 0.1 < np.sqrt(np.mean((after[path] - before[path]) ** 2)) < 0.3


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match=r"optimizer.kind must be one of 'adamw', .*'muon', got 'sgd'"):
        OptimizerConfig(kind="sgd")

"""Lion and Adafactor, learning rates by path, limits by tower, and the moving average: against their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from transformers.optimization import Adafactor

from jvlm.errors import UserError
from jvlm.training import optimizer, trainable
from jvlm.training.config import OptimizerConfig

SHAPES = {
    "encoder.patch_embed.kernel": ((24, 8), ("patch", "embed")),
    "connector.mlp.up.kernel": ((2, 128, 160), ("embed", "mlp")),  # of two layers
    "decoder.blocks.layer.attention.q.adapter.a": ((2, 8, 4), ("embed", "rank")),
    "decoder.blocks.layer.attention.q.adapter.b": ((2, 4, 8), ("rank", "heads")),
    "decoder.blocks.layer.attention.q.adapter.magnitude": ((2, 8), ("heads",)),
    "decoder.norm.scale": ((8,), ("norm",)),
}
PLAIN = {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 1e9}
STEPS = 3


def numbers(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, (shape, _) in SHAPES.items()}


def run(config: OptimizerConfig, gradients=numbers):
    """(parameters after each step, state) of updates with gradients of their own."""
    params = {path: jnp.asarray(x) for path, x in numbers(0).items()}
    variables = {path: nnx.Param(params[path], axes=axes) for path, (_, axes) in SHAPES.items()}
    tx = optimizer.make(config, 10, variables)
    state, found = tx.init(params), []
    update = jax.jit(tx.update)
    for step in range(1, STEPS + 1):
        updates, state = update({p: jnp.asarray(g) for p, g in gradients(step).items()}, state, params)
        params = optax.apply_updates(params, updates)
        found.append({path: np.asarray(x) for path, x in params.items()})
    return found, state


def test_lion_moves_by_the_sign_of_its_interpolated_momentum():
    config = OptimizerConfig(kind="lion", learning_rate=0.01, weight_decay=0.5, beta1=0.9, beta2=0.99, **PLAIN)
    found = run(config)[0][-1]
    for path, (_, axes) in SHAPES.items():
        x, momentum = numbers(0)[path].astype(np.float64), 0.0
        for step in range(1, STEPS + 1):
            g = numbers(step)[path].astype(np.float64)
            update = np.sign(0.9 * momentum + 0.1 * g) + (0.5 * x if len(axes) > 1 else 0.0)
            x, momentum = x - 0.01 * update, 0.99 * momentum + 0.01 * g
        np.testing.assert_allclose(found[path], x, rtol=1e-5, atol=1e-6, err_msg=path)


def test_adafactor_is_transformers_for_each_layer():
    """Where both factor the second moment: matrices of 128 and more on each side, and vectors, which neither does."""
    config = OptimizerConfig(kind="adafactor", learning_rate=0.01, weight_decay=0.0, adafactor_clip=0.5, **PLAIN)
    found = run(config)[0][-1]
    paths = ("connector.mlp.up.kernel", "decoder.blocks.layer.attention.q.adapter.magnitude", "decoder.norm.scale")
    for path in paths:
        layered = SHAPES[path][0][0] == 2
        for layer in range(2 if layered else 1):
            at = layer if layered else ...
            parameter = torch.nn.Parameter(torch.tensor(numbers(0)[path][at]))
            theirs = Adafactor([parameter], lr=0.01, clip_threshold=0.5, scale_parameter=False, relative_step=False)
            for step in range(1, STEPS + 1):
                parameter.grad = torch.tensor(numbers(step)[path][at])
                theirs.step()
            np.testing.assert_allclose(found[path][at], parameter.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=path)


def test_adafactor_keeps_a_row_and_a_column_of_each_large_matrix():
    _, state = run(OptimizerConfig(kind="adafactor", **PLAIN))
    kept = [x for x in jax.tree.leaves(state) if x.ndim and x.size > 2 * 160]
    assert not kept, "nothing of the size of a layer's matrix of 128 x 160"


RATES = OptimizerConfig(
    learning_rate=0.1,
    encoder_lr=0.2,
    lr_pattern=(("decoder.norm.*", 0.3), ("decoder.*", 0.01)),
    lora_plus_ratio=16.0,
    weight_decay=0.0,
    eps=1e-12,
    **PLAIN,
)
EXPECTED = {
    "encoder.patch_embed.kernel": ("encoder", 0.2),
    "connector.mlp.up.kernel": ("connector", 0.1),
    "decoder.blocks.layer.attention.q.adapter.a": ("decoder.*", 0.01),
    "decoder.blocks.layer.attention.q.adapter.b": ("decoder.* lora+", 0.16),
    "decoder.blocks.layer.attention.q.adapter.magnitude": ("decoder.* lora+", 0.16),
    "decoder.norm.scale": ("decoder.norm.*", 0.3),
}


def test_each_parameter_moves_at_the_rate_of_its_path_and_second_adapter_matrices_faster_by_lora_plus():
    first = run(RATES)[0][0]
    for path, (name, rate) in EXPECTED.items():
        assert RATES.group_of(path) == pytest.approx((name, rate)), path
        # the first step of AdamW has the size of the learning rate in every number
        moved = np.abs(first[path] - numbers(0)[path])
        np.testing.assert_allclose(moved, rate, rtol=1e-4, err_msg=path)


def test_a_rate_of_a_path_trains_or_freezes_it_whatever_its_tower_does():
    config = OptimizerConfig(
        learning_rate=0.0, connector_lr=0.1, lr_pattern=(("decoder.norm.*", 0.3), ("connector.mlp.*", 0.0))
    )
    is_trainable = trainable.from_config(config)
    assert [path for path in SHAPES if is_trainable(path, None)] == ["decoder.norm.scale"]
    only = OptimizerConfig(learning_rate=0.0, lr_pattern=(("decoder.norm.*", 0.3),))
    trainable.check_patterns(only, SHAPES)
    with pytest.raises(UserError, match=r"optimizer.lr_pattern: 'decoder.nrom.\*' matches no parameter"):
        trainable.check_patterns(OptimizerConfig(lr_pattern=(("decoder.nrom.*", 0.3),)), SHAPES)
    with pytest.raises(UserError, match="every tower is frozen"):
        OptimizerConfig(learning_rate=0.0)
    with pytest.raises(UserError, match=r"optimizer.lr_pattern: the learning rate of 'a' must be at least 0, got -1"):
        OptimizerConfig(lr_pattern=(("a", -1.0),))
    with pytest.raises(UserError, match=r"optimizer.lora_plus_ratio must be at least 1, got 0.5"):
        OptimizerConfig(lora_plus_ratio=0.5)


def test_matrices_decay_but_for_those_that_are_named_and_magnitudes_norms_and_biases_never_do():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, no_decay=("connector.*",), **PLAIN)
    zeros = lambda step: {path: np.zeros_like(x) for path, x in numbers(0).items()}  # noqa: E731
    first = run(config, zeros)[0][0]
    shrunk = {path for path, x in first.items() if not np.array_equal(x, numbers(0)[path])}
    assert shrunk == {p for p, (_, axes) in SHAPES.items() if len(axes) == 2} - {"connector.mlp.up.kernel"}
    path = "encoder.patch_embed.kernel"
    np.testing.assert_allclose(first[path], 0.95 * numbers(0)[path], rtol=1e-6)


def test_a_tower_has_a_limit_of_its_own_below_that_of_the_whole_gradient():
    """Read off the mean of AdamW's first step, which is a tenth of the gradient that it was given."""
    config = OptimizerConfig(encoder_max_grad_norm=0.5, decoder_max_grad_norm=1e6, **{**PLAIN, "max_grad_norm": 3.0})
    params = {path: jnp.asarray(x) for path, x in numbers(0).items()}
    tx = optimizer.make(config, 10, {p: nnx.Param(params[p], axes=axes) for p, (_, axes) in SHAPES.items()})
    update = jax.jit(tx.update)
    gradients = {p: g.astype(np.float64) for p, g in numbers(1).items()}
    _, state = update({p: jnp.asarray(g) for p, g in numbers(1).items()}, tx.init(params), params)
    (adam,) = [part for part in state if hasattr(part, "mu")]
    encoder = "encoder.patch_embed.kernel"
    gradients[encoder] *= 0.5 / np.linalg.norm(gradients[encoder])
    whole = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert whole > 3.0
    for path, gradient in gradients.items():
        np.testing.assert_allclose(adam.mu[path], 0.1 * gradient * 3.0 / whole, rtol=1e-5, atol=1e-7, err_msg=path)


def test_the_average_begins_at_the_start_and_follows_the_parameters():
    config = OptimizerConfig(learning_rate=0.1, ema_decay=0.8, **PLAIN)
    found, state = run(config)
    without, _ = run(OptimizerConfig(learning_rate=0.1, **PLAIN))
    average = optimizer.ema_of(state, {path: jnp.asarray(x) for path, x in found[0].items()})
    for path in SHAPES:
        np.testing.assert_array_equal(found[-1][path], without[-1][path], err_msg="the average changes no update")
        expected = numbers(0)[path].astype(np.float64)
        for params in found:
            expected = 0.8 * expected + 0.2 * params[path]
        np.testing.assert_allclose(average[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)
    assert optimizer.ema_of(run(OptimizerConfig(**PLAIN))[1], {}) is None

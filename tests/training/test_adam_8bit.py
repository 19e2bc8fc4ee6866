"""AdamW with 8-bit moments against bitsandbytes' map and quantisation (tests/training/adam_8bit_golden.py)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jvlm.training import optimizer
from jvlm.training.config import OptimizerConfig
from jvlm.training.optimizer import eight_bit
from tests.training import adam_8bit_golden as golden

PATH = "decoder.blocks.layer.mlp.up.kernel"


@pytest.fixture(scope="module")
def made():
    with np.load(golden.PATH) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_the_values_of_bitsandbytes_map(made, signed):
    table = made["signed_map" if signed else "unsigned_map"]
    found = eight_bit.decode(jnp.arange(256, dtype=jnp.uint8), signed=signed)
    np.testing.assert_allclose(found, table, rtol=3e-7, atol=0)
    np.testing.assert_array_equal(eight_bit.encode(jnp.asarray(table), signed=signed), np.arange(256))


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_get_the_nearest_value_of_the_map(made, signed):
    table = made["signed_map" if signed else "unsigned_map"].astype(np.float64)
    rng = np.random.default_rng(0)
    x = 10.0 ** rng.uniform(-8, 0, 100_000) * (rng.choice([-1, 1], 100_000) if signed else 1)
    x = np.concatenate([x, [-1.0, 1.0, 0.0] if signed else [1.0, 0.0]]).astype(np.float32)
    found = table[np.asarray(eight_bit.encode(jnp.asarray(x), signed=signed))]
    nearest = np.abs(table - x[:, None].astype(np.float64)).min(1)
    # between two values it may be either, within the rounding of float32
    assert (np.abs(found - x) <= nearest + 3e-7 * np.abs(x)).all()


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_have_the_codes_and_scales_of_bitsandbytes(made, signed):
    name = "signed" if signed else "unsigned"
    x = golden.numbers(0) if signed else golden.numbers(0) ** 2
    found = eight_bit.quantize(jnp.asarray(x), -1, signed=signed)
    np.testing.assert_array_equal(found.scale, made[f"{name}_scale"])
    table, scale = made[f"{name}_map"], np.repeat(found.scale, golden.BLOCK, -1)
    apart = np.flatnonzero(np.asarray(found.codes) != made[f"{name}_codes"])
    assert len(apart) <= 2, "numbers halfway between two values"
    ours, theirs = (table[np.asarray(c).ravel()[apart]] for c in (found.codes, made[f"{name}_codes"]))
    shares = (x / scale).ravel()[apart]
    np.testing.assert_allclose(np.abs(ours - shares), np.abs(theirs - shares), rtol=1e-4)
    back = eight_bit.dequantize(found, -1, signed=signed)
    np.testing.assert_allclose(back, table[np.asarray(found.codes)] * scale, rtol=1e-6, atol=0)


def test_steps_are_those_of_adamw_on_moments_that_bitsandbytes_stores(made):
    config = OptimizerConfig(
        kind="adamw_8bit",
        learning_rate=golden.RATE,
        weight_decay=golden.DECAY,
        beta1=golden.BETAS[0],
        beta2=golden.BETAS[1],
        eps=golden.EPS,
        schedule="constant",
        warmup_ratio=0.0,
        max_grad_norm=1e9,
    )
    params = {PATH: jnp.asarray(golden.numbers(1))}
    tx = optimizer.make(config, 10, {PATH: nnx.Param(params[PATH], axes=("embed", "mlp"))})
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(1, golden.STEPS + 1):
        updates, state = update({PATH: jnp.asarray(golden.numbers(1 + step))}, state, params)
        params = optax.apply_updates(params, updates)
    found, expected = np.asarray(params[PATH]), made["parameter"]
    # a number halfway between two codes may become either, which changes the steps after it
    equal = np.isclose(found, expected, rtol=2e-6, atol=1e-6)
    assert equal.mean() > 0.999, (found[~equal], expected[~equal])


SHAPES = {
    "decoder.blocks.layer.mlp.up.kernel": ((3, 60, 350), ("embed", "mlp")),  # three layers, uneven blocks
    "decoder.blocks.layer.mlp.experts.up": ((2, 2, 96, 64), ("experts", "embed", "mlp")),
    "decoder.blocks.layer.attention.q.adapter.a": ((3, 1024, 4), ("embed", "rank")),  # blocks along the longer axis
    "decoder.embedding": ((128, 64), ("vocab", "embed")),
    "decoder.norm.scale": ((8192,), ("norm",)),
    "connector.small.kernel": ((8, 8), ("embed", "mlp")),
}
EIGHT_BIT = list(SHAPES)[:3]


def test_matrices_of_any_shape_have_moments_of_two_bytes_a_value_and_step_nearly_as_adamw():
    rng = np.random.default_rng(0)
    params = {p: jnp.asarray(rng.normal(size=shape), jnp.float32) for p, (shape, _) in SHAPES.items()}
    variables = {p: nnx.Param(params[p], axes=axes) for p, (_, axes) in SHAPES.items()}
    gradients = [{p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, (s, _) in SHAPES.items()} for _ in range(4)]
    ours, exact = eight_bit.scale_by_adam_8bit(0.9, 0.95, 1e-8, variables), optax.scale_by_adam(0.9, 0.95, 1e-8)
    states = [jax.jit(one.init)(params) for one in (ours, exact)]
    update, exact_update = jax.jit(ours.update), jax.jit(exact.update)
    for gradient in gradients:
        steps, states[0] = update(gradient, states[0])
        expected, states[1] = exact_update(gradient, states[1])
    for path, value in params.items():
        error = np.sqrt(np.mean((steps[path] - expected[path]) ** 2))
        size = sum(x.nbytes for x in jax.tree.leaves((states[0].mu[path], states[0].nu[path])))
        if path in EIGHT_BIT:
            assert 1e-6 < error < 0.03, path
            assert size < 2.1 * value.size, path
        else:
            np.testing.assert_allclose(steps[path], expected[path], rtol=2e-6, err_msg=path)
            assert size == 8 * value.size


@pytest.mark.parametrize(
    ("length", "block"),
    [(4096, 256), (3584, 224), (18944, 148), (14336, 224), (1024, 256), (8, 256), (700, 175), (350, 175)],
)
def test_blocks_are_a_whole_number_and_many_devices_may_split_them_where_that_is_possible(length, block):
    assert eight_bit.block_length(length) == block

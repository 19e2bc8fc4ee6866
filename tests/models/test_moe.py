"""The mixture of experts against a loop over experts in torch, float64: outputs, losses, statistics, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional as F

from jvlm.errors import UserError
from jvlm.models import registry
from jvlm.models.decoders import moe
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.layers import Precision
from tests import quick

D, B, S = 12, 2, 11
SMALL = MoEConfig(experts=5, top_k=2, intermediate_size=7)
TIGHT = MoEConfig(experts=5, top_k=2, intermediate_size=7, capacity_factor=0.6)
SWITCH = MoEConfig(experts=3, top_k=1, intermediate_size=7, renormalise=False, capacity_factor=0.5)
SEGMENTS = np.array([[1] * 6 + [2] * 3 + [0] * 2, [1] * 4 + [0] * 7], np.int32)


def build(config):
    precision, rng = Precision(compute_dtype="float32"), np.random.default_rng(0)
    module = quick.random_module(lambda: registry.build(config, width=D, precision=precision, rngs=nnx.Rngs(3)))
    shapes = {name: getattr(module, name)[...].shape for name in ("router", "gate", "up", "down")}
    values = {name: rng.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}
    for name, value in values.items():
        getattr(module, name)[...] = jnp.asarray(value)
    return module, values


def reference(config, params, x, valid):
    """(y, report) of tokens [T, D]: token by token, expert by expert."""
    logits = x @ params["router"]
    probs = logits.softmax(-1)
    top, chosen = probs.topk(config.top_k, -1)
    gates = top / top.sum(-1, keepdim=True) if config.renormalise else top
    places = config.capacity(len(x)) if config.capacity_factor else len(x)
    taken, dropped, y = [0] * config.experts, 0, torch.zeros_like(x)
    for choice in range(config.top_k):
        for t in np.flatnonzero(valid):
            e = int(chosen[t, choice])
            taken[e] += 1
            if taken[e] > places:
                dropped += 1
                continue
            hidden = F.silu(x[t] @ params["gate"][e]) * (x[t] @ params["up"][e])
            y[t] = y[t] + gates[t, choice] * (hidden @ params["down"][e])
    seen = torch.from_numpy(valid)
    first = F.one_hot(chosen[seen, 0], config.experts).double().mean(0)
    balance = config.experts * (first * probs[seen].mean(0)).sum()
    z = logits[seen].logsumexp(-1).square().mean()
    load = np.array(taken) / np.mean(taken)
    return y, {
        "loss": config.balance_weight * balance + config.z_weight * z,
        "router/balance": balance,
        "router/z": z,
        "router/entropy": -(probs[seen] * probs[seen].log()).sum(-1).mean() / np.log(config.experts),
        "router/load_max": load.max(),
        "router/load_min": load.min(),
        "router/dropped": dropped / (valid.sum() * config.top_k),
    }


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    x, d_y = (rng.normal(size=(B, S, D)).astype(np.float32) for _ in range(2))
    x[SEGMENTS == 0] = 1e4  # padding counts nowhere, whatever it holds
    return x, d_y


@functools.partial(jax.jit, static_argnums=0)
def run(graph, state, x, d_y):
    """(y, report) and the gradients of <y, d_y> + 100 loss in parameters and input."""

    def total(state, x):
        y, report = nnx.merge(graph, state)(x, jnp.asarray(SEGMENTS))
        return jnp.sum(y * d_y) + 100 * report["loss"], (y, report)

    (_, found), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(state, x)
    return found, grads


@nnx.jit
def apply(module, x, segments):
    return module(x, segments)


@pytest.mark.parametrize("config", [SMALL, TIGHT, SWITCH], ids=["no drops", "capacity", "switch"])
def test_it_equals_a_loop_over_experts_with_its_gradients(config, inputs):
    x, d_y = inputs
    module, values = build(config)
    graph, state = nnx.split(module)
    (y, report), (d_state, d_x) = run(graph, state, x, d_y)

    params = {name: torch.from_numpy(value).double().requires_grad_() for name, value in values.items()}
    flat = torch.from_numpy(x).double().reshape(-1, D).requires_grad_()
    valid = SEGMENTS.reshape(-1) > 0
    expected, expected_report = reference(config, params, flat, valid)
    ((expected * torch.from_numpy(d_y).reshape(-1, D)).sum() + 100 * expected_report["loss"]).backward()
    expected_report = {name: float(torch.as_tensor(value).detach()) for name, value in expected_report.items()}

    np.testing.assert_allclose(y.reshape(-1, D), expected.detach(), atol=2e-5)
    assert set(report) == set(expected_report)
    for name, value in expected_report.items():
        assert float(report[name]) == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert (float(report["router/dropped"]) > 0) == (config.capacity_factor is not None)
    d_params = {path[-1]: v.get_value() for path, v in nnx.to_flat_state(d_state)}
    for name, value in params.items():
        np.testing.assert_allclose(d_params[name], value.grad, atol=1e-4, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(d_x.reshape(-1, D), flat.grad, atol=1e-4, rtol=1e-4)
    assert not np.asarray(d_x)[SEGMENTS == 0].any()


def test_enough_room_drops_nothing_and_gives_what_grouped_products_give(inputs):
    x, d_y = inputs
    module, _ = build(MoEConfig(experts=5, top_k=2, intermediate_size=7, capacity_factor=2.5))
    (roomy, report), _ = run(*nnx.split(module), x, d_y)
    (free, _), _ = run(*nnx.split(build(SMALL)[0]), x, d_y)
    assert float(report["router/dropped"]) == 0
    np.testing.assert_allclose(roomy, free, atol=1e-5)


def test_a_token_is_answered_alone_as_in_its_row(inputs):
    x, _ = inputs
    module, _ = build(SMALL)
    whole, _ = apply(module, x, SEGMENTS)
    other, _ = apply(module, np.where((SEGMENTS == 2)[..., None], -3 * x, x), SEGMENTS)
    np.testing.assert_array_equal(other[SEGMENTS == 1], whole[SEGMENTS == 1])


@pytest.mark.parametrize("adapters", [0, 3])
def test_on_tpu_a_step_of_decoding_by_all_experts_gives_what_the_chosen_ones_give(adapters):
    """Among the choices are those of other devices' experts, which have numbers outside."""
    rng = np.random.default_rng(0)
    expert = jnp.asarray(rng.integers(-2, 7, (9, 1, 2)))
    x, share = (rng.normal(size=shape).astype(np.float32) for shape in ((9, 1, D), (9, 1, 2)))
    shapes = [
        ((5, i, o), *((5, i, 2 * adapters), (5, 2 * adapters, o)) * bool(adapters)) for i, o in ((D, 7), (D, 7), (7, D))
    ]
    weights = [tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in part) for part in shapes]
    chosen = np.eye(3, dtype=np.float32)[np.arange(9) % 3][:, None, :adapters]
    x = np.concatenate([x, chosen], -1)
    ways = (moe._by_all_experts, moe._by_chosen_experts)
    found, expected = (jax.jit(way)(x, expert, share, *weights) for way in ways)
    assert np.abs(expected[0]).max() > 1
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())


def test_a_batch_of_padding_alone_gives_zeros_and_finite_statistics():
    module, _ = build(SMALL)
    y, report = apply(module, np.full((B, S, D), np.nan, np.float32), np.zeros_like(SEGMENTS))
    assert not np.asarray(y).any()
    assert np.isfinite([float(report[n]) for n in ("router/dropped", "router/load_max")]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"top_k": 6, "experts": 5}, "top_k 6 must be between 1 and experts 5"), ({"capacity_factor": 0.0}, "positive")],
)
def test_impossible_mixtures_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        MoEConfig(**changes)

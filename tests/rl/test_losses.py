"""Policy losses, their gradients, weights and metrics against golden values made with TRL and verl."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvlm.errors import UserError
from jvlm.rl.losses import PolicyLoss, SampledTokens, policy_loss, token_weights

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "policy_losses.json").read_text())
CASE, VARIANTS = GOLDEN["case"], GOLDEN["variants"]
MASK, LENGTHS, GROUPS = np.asarray(CASE["mask"]), np.asarray(CASE["lengths"]), np.asarray(CASE["groups"])
TRUNCATED = np.asarray(CASE["truncated"], bool)
B, T = MASK.shape

PPO = {"kind": "ppo", "ratio_low": 0.8, "ratio_high": 1.2}
DAPO = {**PPO, "ratio_high": 1.28, "normalise": "batch"}
SETTINGS = {
    "mimo_on_policy_group": {},
    "on_policy_token": {"normalise": "batch"},
    "on_policy_sequence": {"normalise": "sequence"},
    "grpo_clip_sequence": {**PPO, "normalise": "sequence"},
    "grpo_clip_token": {**PPO, "normalise": "batch"},
    "dr_grpo_const6": {**PPO, "normalise": "constant", "constant_length": 6},
    "dr_grpo_const10": {**PPO, "normalise": "constant", "constant_length": 10},
    "dapo_clip_higher": DAPO,
    "dual_clip_3": {**DAPO, "dual_clip": 3.0},
    "two_sided_delta_1.5": {**DAPO, "ratio_cap": 1.5},
    "gspo_wide": {**DAPO, "kind": "gspo", "normalise": "sequence"},
    "gspo_paper": {"kind": "gspo", "ratio_low": 1 - 3e-4, "ratio_high": 1 + 4e-4, "normalise": "sequence"},
    "cispo_cap_1.5": {"kind": "cispo", "ratio_low": 0.0, "ratio_high": 1.5, "normalise": "batch"},
    "cispo_band": {"kind": "cispo", "ratio_low": 0.8, "ratio_high": 1.28, "normalise": "batch"},
    "rollout_token_truncate_2": {**DAPO, "correction": "token_truncate"},
    "rollout_token_mask_0p5_2": {**DAPO, "correction": "token_mask"},
    "rollout_sequence_truncate_2": {**DAPO, "correction": "sequence_truncate"},
    "rollout_sequence_mask_0p5_2": {**DAPO, "correction": "sequence_mask"},
    "grpo_clip_sequence_kl_0.04": {**PPO, "normalise": "sequence", "kl_weight": 0.04},
    "dapo_truncated_masked": DAPO,
}


def _flat(values):
    return jnp.asarray(values, jnp.float32).reshape(-1)


def _tokens(settings, on_policy, *, left_out=None, order=None):
    weights = np.where(MASK > 0, token_weights(LENGTHS, GROUPS, settings, left_out=left_out)[:, None], 0)
    advantages = np.repeat(np.asarray(CASE["adv"])[:, None], T, 1)
    answers = np.repeat(np.arange(B)[:, None], T, 1).reshape(-1)
    old = None if on_policy else _flat(CASE["old_logp"])
    tokens = SampledTokens(
        _flat(advantages),
        _flat(weights),
        jnp.asarray(answers),
        old,
        _flat(CASE["rollout_logp"]),
        _flat(CASE["ref_logp"]),
        B,
    )
    return tokens if order is None else jax.tree.map(lambda x: x[order], tokens)


@pytest.mark.parametrize("name", SETTINGS)
def test_golden(name):
    variant, settings = VARIANTS[name], PolicyLoss(**SETTINGS[name])
    left_out = TRUNCATED if "truncated" in name else None
    tokens = _tokens(settings, settings.kind == "on_policy", left_out=left_out)
    loss = jax.jit(jax.value_and_grad(lambda lp: policy_loss(settings, lp, tokens), has_aux=True))
    (value, metrics), gradient = loss(_flat(CASE["logp"]))
    assert float(value) == pytest.approx(variant["loss"], abs=1e-6)
    if "grad_logp" in variant:
        np.testing.assert_allclose(np.asarray(gradient).reshape(B, T), variant["grad_logp"], atol=1e-6)
    expected = variant.get("metrics", {})
    for metric in {"clip_low", "clip_high", "kl"} & set(expected):
        assert float(metrics[metric] / metrics["tokens"]) == pytest.approx(expected[metric], rel=1e-5)
    if "weight_mean" in expected:
        count, total, squares = (float(metrics[m]) for m in ("tokens", "correction", "correction_squared"))
        assert total / count == pytest.approx(expected["weight_mean"], rel=1e-5)
        assert total**2 / squares / count == pytest.approx(expected["ess"], rel=1e-5)


def test_all_variants_of_a_loss_are_compared():
    other = {"sequence_mean_truncated_masked", "mimo_with_token_truncation_2", "kl_k1", "kl_k2", "kl_k3"}
    assert set(VARIANTS) - set(SETTINGS) == other | {"kl_to_rollout", "entropy_mean", "accumulation"}


def test_mimos_loss_with_correction_of_the_present_policy():
    settings = PolicyLoss(normalise="batch", correction="token_truncate")
    value, _ = policy_loss(settings, _flat(CASE["logp"]), _tokens(settings, True))
    assert float(value) == pytest.approx(VARIANTS["mimo_with_token_truncation_2"]["loss"], abs=1e-6)


def test_masked_answers_leave_the_denominator():
    settings = PolicyLoss(**PPO, normalise="sequence")
    tokens = _tokens(settings, False, left_out=TRUNCATED)
    value, _ = policy_loss(settings, _flat(CASE["logp"]), tokens)
    assert float(value) == pytest.approx(VARIANTS["sequence_mean_truncated_masked"]["over_left"], abs=1e-6)


def test_micro_batches_and_other_orders_of_tokens_add_up():
    settings = PolicyLoss(**DAPO)
    whole = policy_loss(settings, _flat(CASE["logp"]), _tokens(settings, False))[0]
    assert float(whole) == pytest.approx(VARIANTS["accumulation"]["right"], abs=1e-6)
    order = np.random.default_rng(0).permutation(B * T)
    parts = 0.0
    for part in (order[:17], order[17:]):
        parts += policy_loss(settings, _flat(CASE["logp"])[part], _tokens(settings, False, order=part))[0]
    assert float(parts) == pytest.approx(float(whole), abs=1e-6)


def test_distance_of_engine_and_trainer():
    settings = PolicyLoss(**DAPO)
    _, metrics = policy_loss(settings, _flat(CASE["logp"]), _tokens(settings, False))
    expected = VARIANTS["kl_to_rollout"]
    assert float(metrics["rollout_kl1"] / metrics["tokens"]) == pytest.approx(expected["k1"], abs=1e-6)
    assert float(metrics["rollout_kl3"] / metrics["tokens"]) == pytest.approx(expected["k3"], abs=1e-6)


def test_an_extreme_ratio_is_finite():
    settings = PolicyLoss(kind="ppo")
    tokens = SampledTokens(
        *(jnp.asarray(x, jnp.float32) for x in ([-1.0], [1.0])),
        jnp.zeros(1, jnp.int32),
        jnp.full(1, -900.0),
        None,
        None,
        1,
    )
    value, gradient = jax.value_and_grad(lambda lp: policy_loss(settings, lp, tokens)[0])(jnp.zeros(1))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_a_batch_without_trained_answers_has_no_weights():
    assert not token_weights(LENGTHS, GROUPS, PolicyLoss(), left_out=np.ones(B, bool)).any()


def test_settings_that_need_one_another():
    with pytest.raises(UserError, match="constant_length"):
        PolicyLoss(normalise="constant")
    with pytest.raises(UserError, match="ratio_high"):
        PolicyLoss(ratio_high=0.9)

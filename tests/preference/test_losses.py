"""Preference losses and their gradients against TRL's own code on given log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvlm.preference import losses
from jvlm.preference.losses import Answers, PairLossSettings, pair_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "preference_losses.json").read_text())
POLICY, REFERENCE = (jnp.asarray(GOLDEN[f"{name}_token_logps"]) for name in ("policy", "reference"))
MASK = jnp.asarray(GOLDEN["completion_mask"], jnp.float32)[:, 1:]
PAIRS = 3


def _cases(kind):
    return [pytest.param(case, id=name) for name, case in GOLDEN["cases"].items() if case["kind"] == kind]


def _answers(policy, alpha=None):
    tokens = MASK.sum(-1)
    shorter = jnp.tile(jnp.minimum(tokens[:PAIRS], tokens[PAIRS:]), 2)
    alpha = 1.0 if alpha is None else alpha
    sums = [losses.shortened_sums(x, MASK, shorter, alpha) for x in (policy, REFERENCE)]
    both = [Answers(*(x[part] for x in (*sums, tokens))) for part in (slice(PAIRS), slice(PAIRS, None))]
    return both[0], both[1]


@pytest.mark.parametrize("case", _cases("dpo"))
def test_pairs(case):
    smoothing = case["label_smoothing"] if case["loss_type"] != ["sigmoid"] else 0.0
    settings = PairLossSettings(beta=case["beta"], label_smoothing=smoothing)

    def loss(policy):
        chosen, rejected = _answers(policy, case["ld_alpha"])
        total = 0.0
        for kind, weight in zip(case["loss_type"], case["loss_weights"] or [1.0], strict=True):
            if kind == "sft":
                total += weight * -chosen.policy.sum() / chosen.tokens.sum()
            else:
                total += weight * pair_loss(kind, chosen, rejected, settings).mean()
        return total

    value, gradient = jax.jit(jax.value_and_grad(loss))(POLICY)
    assert float(value) == pytest.approx(case["loss"], rel=2e-6)
    inside = np.asarray(MASK) > 0
    np.testing.assert_allclose(np.asarray(gradient)[inside], np.asarray(case["grad_token_logps"])[inside], atol=2e-6)


def test_conservative_dpo_is_a_mixture_of_both_orders():
    chosen, rejected = _answers(POLICY)
    settings = PairLossSettings(label_smoothing=0.2)
    mixed = 0.8 * pair_loss("sigmoid", chosen, rejected) + 0.2 * pair_loss("sigmoid", rejected, chosen)
    np.testing.assert_allclose(pair_loss("sigmoid", chosen, rejected, settings), mixed, rtol=1e-6)


def test_equal_models_have_the_loss_of_a_coin():
    chosen, rejected = (a._replace(reference=a.policy) for a in _answers(POLICY))
    np.testing.assert_allclose(pair_loss("sigmoid", chosen, rejected), np.log(2), atol=1e-6)


def test_orpo():
    case = GOLDEN["cases"]["orpo"]
    chosen, rejected = _answers(POLICY)

    def loss(c, r):
        one, zero = jnp.ones(PAIRS), jnp.zeros(PAIRS)
        settings = PairLossSettings(beta=case["beta"])
        return pair_loss("orpo", Answers(c, zero, one), Answers(r, zero, one), settings).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(chosen.mean, rejected.mean)
    assert float(value) == pytest.approx(case["or_term"], rel=1e-5)
    np.testing.assert_allclose(gradients, [case["grad_chosen"], case["grad_rejected"]], atol=2e-6)


@pytest.mark.parametrize("case", _cases("cpo"))
def test_cpo_and_simpo(case):
    simpo = "simpo_gamma" in case
    settings = PairLossSettings(beta=case["beta"], gamma=case.get("simpo_gamma", 0.0))
    answers = _answers(POLICY)
    given = [a.mean if simpo else a.policy for a in answers]

    def loss(c, r):
        pair = [Answers(x, jnp.zeros(PAIRS), jnp.ones(PAIRS)) for x in (c, r)]
        return pair_loss("simpo" if simpo else "cpo", *pair, settings).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(*given)
    assert float(value) == pytest.approx(case["loss"], rel=2e-6)
    np.testing.assert_allclose(gradients, [case["grad_chosen"], case["grad_rejected"]], atol=2e-6)


@pytest.mark.parametrize("case", _cases("kto"))
def test_kto(case):
    chosen, rejected = _answers(POLICY)
    answers = Answers(*(jnp.concatenate(both) for both in zip(chosen, rejected, strict=True)))
    other = Answers(jnp.asarray(case["kl_policy_logps"]), jnp.asarray(case["kl_reference_logps"]), answers.tokens)
    shift = losses.kto_shift(other) if case["kl"] else jnp.zeros(())
    assert float(shift) == pytest.approx(case["kl"], rel=1e-5)
    weights = {name: case[name] for name in ("desirable_weight", "undesirable_weight")}
    value = losses.kto_loss(answers, jnp.asarray(case["labels"]), shift, beta=case["beta"], **weights).mean()
    assert float(value) == pytest.approx(case["loss"], rel=2e-6)


@pytest.mark.parametrize("case", _cases("reward"))
def test_reward_model(case):
    margin = None if case["margin"] is None else jnp.asarray(case["margin"])

    def loss(scores):
        pair = scores[:PAIRS], scores[PAIRS:]
        return losses.reward_model_loss(*pair, margin, centre=case["center"] or 0.0).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(case["scores"]))
    assert float(value) == pytest.approx(case["loss"], rel=2e-6)
    np.testing.assert_allclose(gradient, case["grad"], atol=2e-6)


def test_all_golden_cases_are_compared():
    assert {case["kind"] for case in GOLDEN["cases"].values()} == {"dpo", "orpo", "cpo", "kto", "reward"}

"""Adapters that PEFT made, in jvlm: logits, loss and gradients are torch's."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jvlm.adapters.attach import attach, detach, extract
from jvlm.adapters.base_matrices import adapter_path
from jvlm.models import vlm
from jvlm.training.supervised import supervised_loss
from tests.adapters import golden

BOUND = 5e-5


def adapted(family, case):
    return attach(golden.base(family), golden.weights(family, case))


def mean_loss(values, model, batch):
    loss = supervised_loss(vlm.bind(model, values), batch)
    return loss.total / loss.weight


def values_of(model):
    return {path: v.get_value() for path, v in vlm.variables(model).items()}


@pytest.mark.parametrize(("family", "case"), golden.CASES)
def test_logits_are_those_of_peft(family, case):
    model, batch = adapted(family, case), golden.batch(family)
    np.testing.assert_allclose(np.asarray(model(batch)), golden.expected(family, case)["logits"], atol=BOUND, rtol=0)


# every kind of tensor that has a gradient; the others of the golden adapters have fewer kinds, or another scale
FAST = {("qwen2_5_vl", "dora"), ("qwen2_5_vl", "bias_and_saved"), ("idefics2", "dora_conv_embed")}


@pytest.mark.parametrize(
    ("family", "case"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in golden.CASES],
)
def test_loss_and_gradients_are_those_of_peft(family, case):
    model, batch = adapted(family, case), golden.batch(family)
    expected = golden.expected(family, case)
    trained = {p: v for p, v in values_of(model).items() if ".adapter." in p or p in model.adapters.parameters}
    frozen = {p: v for p, v in values_of(model).items() if p not in trained}
    loss, grads = jax.jit(jax.value_and_grad(lambda t: mean_loss({**frozen, **t}, model, batch)))(trained)
    np.testing.assert_allclose(float(loss), expected["loss"][0], atol=BOUND, rtol=0)
    wanted = golden.expected_gradients(family, case)
    assert wanted.low_rank.keys() == golden.weights(family, case).low_rank.keys()
    for target, one in wanted.low_rank.items():
        place = adapter_path(target.path)
        rank = one.a.shape[1]
        found = {
            "a": grads[f"{place}.a"][target.index][:, :rank],
            "b": grads[f"{place}.b"][target.index][:rank],
            "magnitude": grads.get(f"{place}.magnitude"),
            "bias": grads.get(f"{place}.bias"),
        }
        for name in ("magnitude", "bias"):
            found[name] = None if found[name] is None else found[name][target.index]
        for name, value in found.items():
            expect = getattr(one, name)
            assert (value is None) == (expect is None), (target, name)
            if expect is not None:
                np.testing.assert_allclose(np.asarray(value), expect, atol=BOUND, rtol=0, err_msg=f"{target} {name}")
    for target, expect in wanted.parameters.items():
        np.testing.assert_allclose(np.asarray(grads[target.path])[target.index], expect, atol=BOUND, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics2"])
def test_the_base_is_torchs_and_is_bit_equal_after_attaching_and_detaching(family):
    model, batch = golden.base(family), golden.batch(family)
    logits = np.asarray(model(batch))
    expected = load_file(golden.ROOT / family / "base" / "expected.safetensors")["logits"]
    np.testing.assert_allclose(logits, expected, atol=BOUND, rtol=0)
    again = detach(adapted(family, "dora_conv_embed"))
    assert all(
        a is b.get_value() for a, b in zip(values_of(model).values(), vlm.variables(again).values(), strict=True)
    )
    np.testing.assert_array_equal(np.asarray(again(batch)), logits)


@pytest.mark.parametrize(("family", "case"), golden.CASES)
def test_what_is_extracted_is_what_was_attached(family, case):
    given = golden.weights(family, case)
    found = extract(adapted(family, case))
    assert found.config == given.config
    assert found.low_rank.keys() == given.low_rank.keys()
    for target, one in given.low_rank.items():
        for name in ("a", "b", "magnitude", "bias", "scale", "alpha"):
            np.testing.assert_array_equal(getattr(found.low_rank[target], name), getattr(one, name))
    assert found.parameters.keys() == given.parameters.keys()
    for target, value in given.parameters.items():
        np.testing.assert_array_equal(found.parameters[target], value)

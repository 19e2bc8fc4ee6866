"""LoRA and DoRA on quantised bases: gradients of the dequantised model's, merging both ways, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from jvlm.adapters.attach import attach, detach, extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.layers import AdapterConstant, AdapterParam
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.quantization.config import QuantizationConfig
from jvlm.quantization.kernels import quantized_kernels
from jvlm.quantization.merging import merge_quantized
from jvlm.quantization.model import dequantized, quantized
from jvlm.training.config import Experiment
from jvlm.weights import hf
from tests.quantization.support import FOLDER, loss_and_gradients, text_batch

ADAPTER = AdapterConfig(rank=4, alpha=8.0, targets=("decoder.attention", "decoder.mlp"), use_dora=True)


@pytest.fixture(scope="module")
def base():
    return hf.load_weights(FOLDER, hf.read_config(FOLDER, Precision(compute_dtype="float32")))


@pytest.fixture(scope="module")
def trained(base):
    """The quantised base with adapters whose second matrices are not zero."""
    model = attach(quantized(base, QuantizationConfig("nf4")), ADAPTER, seed=1)
    rng = np.random.default_rng(0)
    for path, variable in vlm.variables(model).items():
        if path.endswith(".adapter.b"):
            variable.set_value(jax.numpy.asarray(rng.normal(0, 0.02, variable.get_value().shape), "float32"))
    return model


def _gradients(model, batch):
    return loss_and_gradients(
        model, batch, lambda _, v: isinstance(v, AdapterParam) and not isinstance(v, AdapterConstant)
    )


def test_gradients_of_adapters_are_those_on_the_dequantised_base(trained):
    batch = text_batch(trained)
    plain = attach(dequantized(detach(trained), "float32"), extract(trained))
    loss, gradients = _gradients(trained, batch)
    reference, expected = _gradients(plain, batch)
    assert loss == pytest.approx(reference, rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 3 * 7
    for path, value in expected.items():
        assert np.abs(value).max() > 0, path
        np.testing.assert_allclose(gradients[path], value, atol=2e-5 * np.abs(value).max(), err_msg=str(path))


def test_merging_says_which_base_and_measures_both(base, trained):
    examples = [text_batch(base, seed=3)]
    merged, report = merge_quantized(trained, base, examples, into="dequantized")
    assert not list(quantized_kernels(merged))
    # the same numbers, added up before the product and not after
    assert report.dequantized.difference < 1e-5
    assert report.dequantized.same_token == 1
    assert report.base.difference > 100 * report.dequantized.difference
    assert "merged into the dequantised base" in str(report)
    other, report = merge_quantized(trained, base, examples)
    assert report.into == "base"
    kernel = "decoder.blocks.layer.mlp.up.kernel"
    values = [np.asarray(vlm.parameters(m)[kernel].get_value()) for m in (base, merged, other)]
    assert np.abs(values[2] - values[0]).max() > 0
    assert np.abs(values[2] - values[1]).max() > np.abs(values[2] - values[0]).min()
    with pytest.raises(UserError, match="is not quantised"):
        merge_quantized(base, base, examples)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_beginnings_that_take_a_part_of_the_base_are_refused(init):
    config = dataclasses.replace(ADAPTER, init=init, use_dora=False)
    with pytest.raises(UserError, match=rf"adapter.init {init} takes .* \(quantize\)"):
        Experiment("x", init_from="base", adapter=config, quantize=QuantizationConfig())

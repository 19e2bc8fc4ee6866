"""Quantised experts of a mixture: values, gradients of adapters, what the backward pass keeps, and reading folders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jvlm.adapters.attach import attach, detach, extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.layers import AdapterConstant, AdapterParam
from jvlm.models import vlm
from jvlm.models.decoders.moe import EXPERT_AXES, MoE, MoEConfig
from jvlm.models.layer_stack import LayerStack
from jvlm.models.layers import Precision
from jvlm.quantization import formats
from jvlm.quantization.config import QuantizationConfig
from jvlm.quantization.kernels import QuantizedKernel, quantized_kernels
from jvlm.quantization.model import abstract_parts, dequantized, quantized, size_report
from jvlm.weights import hf, safetensors_files, table
from tests import quick
from tests.parallel import models
from tests.quantization.support import loss_and_gradients, with_experts
from tests.support import cpu_devices, run_python

EXPERTS = [f"decoder.blocks.layer.mlp.{name}" for name in ("down", "gate", "up")]
NF4 = QuantizationConfig("nf4")


@pytest.fixture(scope="module")
def plain():
    return quick.random_model(with_experts(3))


def test_experts_are_the_dequantised_ones_each_with_scales_of_its_own(plain):
    model = quantized(plain, NF4)
    kernels = dict(quantized_kernels(model))
    assert [path for path in kernels if ".mlp." in path] == EXPERTS
    values = {path: np.asarray(v.get_value()) for path, v in vlm.parameters(dequantized(model, "float32")).items()}
    for path in EXPERTS:
        whole = np.asarray(vlm.parameters(plain)[path].get_value())
        assert kernels[path].stacked_shape == whole.shape
        for index in np.ndindex(whole.shape[:2]):
            expected = formats.dequantize(formats.quantize(whole[index], "nf4x2"), "nf4x2")
            np.testing.assert_array_equal(values[path][index], expected)
    assert vlm.parameter_counts(model) == vlm.parameter_counts(plain)
    assert "weights as nf4x2" in size_report(model)
    batch = models.batch(plain.config)
    np.testing.assert_allclose(model(batch), dequantized(model, "float32")(batch), atol=2e-5)
    assert np.abs(np.asarray(model(batch)) - np.asarray(plain(batch))).max() > 1e-3


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_of_adapters_beside_quantised_experts_are_those_on_the_dequantised_base(plain, kind):
    config = AdapterConfig(rank=3, targets=("decoder",))
    model, rng = attach(quantized(plain, QuantizationConfig(kind)), config, seed=1), np.random.default_rng(0)
    for path, variable in vlm.variables(model).items():
        if path.endswith(".adapter.b"):
            variable.set_value(jnp.asarray(rng.normal(0, 0.1, variable.get_value().shape), "float32"))
    batch = models.batch(plain.config)
    loss, gradients = _gradients(model, batch)
    reference, expected = _gradients(attach(dequantized(detach(model), "float32"), extract(model)), batch)
    assert loss == pytest.approx(reference, rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert sum("_slot" in path for path in gradients) == 6
    for path, value in expected.items():
        assert np.abs(value).max() > 0, path
        np.testing.assert_allclose(gradients[path], value, atol=5e-5 * np.abs(value).max(), err_msg=path)


def test_a_folder_is_quantised_as_it_is_read_a_layer_of_experts_at_a_time(plain, tmp_path):
    variables, form = vlm.parameters(plain), table.hf_format(plain.config)
    read, tensors = hf.values_of(variables), []
    for entry in table.entries(plain.config, {path: v.get_value().shape for path, v in variables.items()}):
        value = entry.to_checkpoint(read(entry.path, entry.layer))
        tensors.append((entry.name, value.dtype, value.shape, lambda value=value: value))
    safetensors_files.write(tmp_path, safetensors_files.joined(tensors, form.fused), 10**9)
    found = vlm.parameters(hf.load_weights(tmp_path, plain.config, quantize=NF4))
    expected = vlm.parameters(quantized(plain, NF4))
    assert found.keys() == expected.keys()
    for path, variable in found.items():
        np.testing.assert_array_equal(variable.get_value(), expected[path].get_value(), path)


@pytest.mark.slow
def test_a_mesh_splits_experts_and_their_codes_and_gives_the_numbers_of_one_device():
    code = "from tests.quantization.many_devices import experts; experts()"
    found = json.loads(run_python(code, timeout=300, **cpu_devices(4)).splitlines()[-1])
    for format, line in found.items():
        assert line["loss"] == pytest.approx(line["expected"], rel=2e-6), format
        assert line["gradient_difference"] < 2e-5 * line["largest"], format
        assert line["shards"][1:3] == [2, 2], format  # of experts, and of their inputs


class _Stack(nnx.Module):
    def __init__(self, depth: int, rngs: nnx.Rngs):
        config, precision = MoEConfig(every=1, experts=4, top_k=2, intermediate_size=512), Precision()
        self.stack = LayerStack(lambda r: MoE(config, width=256, precision=precision, rngs=r), depth, rngs=rngs)


def _temporaries(depth: int, remat: str) -> int:
    """Bytes beside arguments and results of the gradient by something before each layer, as an adapter needs it."""
    model = nnx.eval_shape(lambda: _Stack(depth, nnx.Rngs(0)))
    experts = model.stack.layer
    for name, axes in EXPERT_AXES.items():
        shape = getattr(experts, name).get_value().shape
        setattr(experts, name, QuantizedKernel("nf4x2", abstract_parts(shape, "nf4x2"), shape[-2:], axes))
    graph, state = nnx.split(model)

    def loss(scale, state, x):
        def body(layer, x, _):
            return x + layer(x * scale.astype(x.dtype), jnp.ones(x.shape[:2], jnp.int32))[0], None

        y, _ = nnx.merge(graph, state).stack(body, x, None, remat=remat)
        return jnp.square(y.astype(jnp.float32)).sum()

    shapes = jax.ShapeDtypeStruct((256,), jnp.float32), state, jax.ShapeDtypeStruct((1, 8, 256), jnp.bfloat16)
    return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_backward_pass_keeps_no_dequantised_experts(remat):
    kernels = 3 * 4 * 256 * 512 * 2
    grown = (_temporaries(12, remat) - _temporaries(4, remat)) / 8
    assert grown < kernels / 8, grown


def _gradients(model, batch):
    loss, found = loss_and_gradients(
        model, batch, lambda _, v: isinstance(v, AdapterParam) and not isinstance(v, AdapterConstant)
    )
    return loss, {".".join(map(str, path)): value for path, value in found.items()}

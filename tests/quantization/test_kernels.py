"""Products with quantised kernels: their values and gradients, what the backward pass keeps, and meshes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.layer_stack import LayerStack
from jvlm.models.layers import Linear, Precision, SwiGLU
from jvlm.quantization import formats
from jvlm.quantization.config import QuantizationConfig
from jvlm.quantization.kernels import QuantizedKernel, quantized_kernels
from jvlm.quantization.model import abstract_parts, dequantized, format_of, quantized, quantized_template, size_report
from jvlm.weights import hf
from tests.quantization.support import FOLDER, loss_and_gradients, text_batch
from tests.support import cpu_devices, run_python

CONFIGS = {
    "int8": QuantizationConfig("int8"),
    "fp8": QuantizationConfig("fp8"),
    "nf4": QuantizationConfig("nf4", double=False),
    "nf4x2": QuantizationConfig("nf4"),
}


@pytest.fixture(scope="module")
def plain():
    return hf.load_weights(FOLDER, hf.read_config(FOLDER, Precision(compute_dtype="float32")))


def _gradients(model, batch):
    """Loss, and its gradient by every parameter but kernels, whatever form they have."""
    return loss_and_gradients(model, batch, lambda path, _: "kernel" not in path)


# the first tier has the two that differ most
_TIERS = [pytest.param(f, marks=() if f in ("int8", "nf4x2") else pytest.mark.slow) for f in CONFIGS]


@pytest.mark.parametrize("format", _TIERS)
def test_loss_and_gradients_are_those_of_the_dequantised_model(plain, format):
    model = quantized(plain, CONFIGS[format])
    assert {kernel.format for _, kernel in quantized_kernels(model)} == {format}
    assert len(list(quantized_kernels(model))) == 7
    batch = text_batch(model)
    loss, gradients = _gradients(model, batch)
    reference, expected = _gradients(dequantized(model, "float32"), batch)
    assert float(loss) == pytest.approx(float(reference), rel=1e-6)
    assert abs(float(loss) - float(_gradients(plain, batch)[0])) > 1e-4  # it is quantised
    assert gradients.keys() == expected.keys()
    for path, value in gradients.items():
        np.testing.assert_allclose(value, expected[path], atol=2e-5 * float(jnp.abs(expected[path]).max() + 1e-3))


@pytest.mark.parametrize("format", CONFIGS)
def test_a_folder_is_quantised_as_it_is_read(plain, format):
    config = CONFIGS[format]
    loaded = hf.load_weights(FOLDER, plain.config, quantize=config)
    expected = vlm.parameters(quantized(plain, config))
    found = vlm.parameters(loaded)
    assert found.keys() == expected.keys()
    for path, variable in found.items():
        np.testing.assert_array_equal(np.asarray(variable.get_value()), np.asarray(expected[path].get_value()), path)
    assert vlm.parameter_counts(loaded) == vlm.parameter_counts(plain)
    assert f"weights as {format}" in size_report(loaded)
    assert format_of(config) == format


class _Stack(nnx.Module):
    def __init__(self, depth: int, rngs: nnx.Rngs):
        precision = Precision(compute_dtype="bfloat16")
        self.stack = LayerStack(lambda r: SwiGLU(256, 1024, bias=False, precision=precision, rngs=r), depth, rngs=rngs)


def _temporaries(depth: int, format: str, remat: str) -> int:
    """Bytes beside arguments and results of the gradient by something before each layer, as an adapter needs it."""
    model = nnx.eval_shape(lambda: _Stack(depth, nnx.Rngs(0)))
    for _, linear in list(nnx.iter_modules(model)):
        if isinstance(linear, Linear):
            shape = linear.kernel.get_value().shape
            linear.kernel = QuantizedKernel(format, abstract_parts(shape, format), shape[-2:], linear.axes)
    graph, state = nnx.split(model)

    def loss(scale, state, x):
        def body(layer, x, _):
            return x + layer(x * scale.astype(x.dtype)), None

        y, _ = nnx.merge(graph, state).stack(body, x, None, remat=remat)
        return jnp.square(y.astype(jnp.float32)).sum()

    shapes = jax.ShapeDtypeStruct((256,), jnp.float32), state, jax.ShapeDtypeStruct((1, 8, 256), jnp.bfloat16)
    return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("format", "remat"),
    [
        ("nf4x2", "none"),
        ("nf4x2", "dots"),
        *(
            pytest.param(f, r, marks=pytest.mark.slow)
            for f, r in [("nf4x2", "full"), ("fp8", "none"), ("int8", "full")]
        ),
    ],
)
def test_the_backward_pass_keeps_no_dequantised_kernels(format, remat):
    """Of a layer more it keeps activations, less than an eighth of that layer's kernels in bfloat16."""
    kernels = 3 * 256 * 1024 * 2
    grown = (_temporaries(12, format, remat) - _temporaries(4, format, remat)) / 8
    assert grown < kernels / 8, grown


def test_what_cannot_be_quantised_is_refused(plain):
    with pytest.raises(UserError, match=r"quantize.targets encoder.nothing match no linear layer; there are connector"):
        quantized_template(plain, QuantizationConfig(targets=("encoder.nothing",)))
    with pytest.raises(UserError, match=r"multiples of 64, and encoder.*attention.out has 48"):
        quantized_template(plain, QuantizationConfig(targets=("*attention.out",)))
    with pytest.raises(UserError, match="targets is empty"):
        QuantizationConfig(targets=())
    assert not any(path.startswith("decoder.head") for path, _ in quantized_kernels(quantized(plain, CONFIGS["int8"])))


def test_the_head_stays_as_it_is(plain):
    model = quantized_template(plain, QuantizationConfig("int8", targets=("decoder.*",)))
    assert isinstance(model.decoder.head.kernel, nnx.Param)


@pytest.mark.slow
def test_meshes_give_the_numbers_of_one_device_and_gather_codes():
    """Kernels split over fsdp and tensor: what is gathered is bytes, never values."""
    code = "from tests.quantization.many_devices import main; main()"
    found = json.loads(run_python(code, timeout=300, **cpu_devices(4)).splitlines()[-1])
    for format, line in found.items():
        assert line["loss"] == pytest.approx(line["expected"], rel=2e-6), format
        assert line["gradient_difference"] < 2e-5, format
        assert line["sharded"], format
        assert set(line["gathered_kernels"]) == {{"int8": "s8"}.get(format, "u8")}, format


def test_parts_of_every_format_are_those_that_shapes_say():
    kernel = np.random.default_rng(0).standard_normal((128, 6)).astype(np.float32)
    for format in formats.PARTS:
        shapes = {name: (aval.shape, aval.dtype) for name, aval in abstract_parts(kernel.shape, format).items()}
        parts = formats.quantize(kernel, format)
        assert {name: (part.shape, part.dtype) for name, part in parts.items()} == shapes

"""Number formats, in numpy and JAX, against what bitsandbytes 0.50.2 made of the same matrix."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jvlm.errors import UserError
from jvlm.quantization import formats, kernels

GOLDEN = load_file(Path(__file__).parent / "data" / "bnb_4bit.safetensors")
KERNEL = np.ascontiguousarray(GOLDEN["W"].T)


def _dequantised_in_jax(parts, format: str) -> np.ndarray:
    return np.asarray(jax.jit(lambda parts: kernels.dequantize(parts, format, "float32"))(parts))


def test_nf4_is_bit_equal_with_bitsandbytes():
    parts = formats.quantize(KERNEL, "nf4")
    codes = formats.unarranged(parts["codes"]).reshape(-1, 2)
    np.testing.assert_array_equal((codes[:, 0] << 4) | codes[:, 1], GOLDEN["nf4.packed"][:, 0])
    np.testing.assert_array_equal(parts["scale"].T.reshape(-1), GOLDEN["nf4.absmax"])
    np.testing.assert_array_equal(formats.NF4, GOLDEN["nf4.code"])
    np.testing.assert_array_equal(formats.dequantize(parts, "nf4").T, GOLDEN["nf4.dequantised"])
    np.testing.assert_array_equal(_dequantised_in_jax(parts, "nf4").T, GOLDEN["nf4.dequantised"])


def test_double_quantisation_is_bit_equal_with_bitsandbytes():
    parts = formats.quantize(KERNEL, "nf4x2")
    np.testing.assert_array_equal(formats.dynamic_map(), GOLDEN["nf4_double.nested_code"])
    np.testing.assert_array_equal(parts["scale_codes"].reshape(-1), GOLDEN["nf4_double.absmax_u8"])
    np.testing.assert_array_equal(parts["scale_scale"], GOLDEN["nf4_double.nested_absmax"])
    np.testing.assert_array_equal(parts["scale_offset"], GOLDEN["nf4_double.offset"][0])
    np.testing.assert_array_equal(formats.dequantize(parts, "nf4x2").T, GOLDEN["nf4_double.dequantised"])
    # one multiplication and addition with one rounding, where the compiler joins them
    np.testing.assert_allclose(
        _dequantised_in_jax(parts, "nf4x2").T, GOLDEN["nf4_double.dequantised"], rtol=2e-7, atol=0
    )


def test_int8_is_that_of_bitsandbytes_up_to_ties():
    """bitsandbytes takes the matrix in float16."""
    parts = formats.quantize(KERNEL.astype(np.float16).astype(np.float32), "int8")
    np.testing.assert_allclose(parts["scale"], GOLDEN["int8.scb"] / 127, rtol=1e-7)
    difference = np.abs(parts["codes"].T.astype(int) - GOLDEN["int8.q"])
    assert difference.max() <= 1
    assert difference.sum() <= 1


# of a normal distribution, as the formats' papers and bitsandbytes have them
@pytest.mark.parametrize(
    ("format", "low", "high"),
    [("int8", 0.006, 0.009), ("fp8", 0.0255, 0.0275), ("nf4", 0.09, 0.094), ("nf4x2", 0.09, 0.094)],
)
def test_relative_error_of_normally_distributed_weights(format, low, high):
    kernel = np.random.default_rng(0).standard_normal((1024, 128)).astype(np.float32)
    parts = formats.quantize(kernel, format)
    error = formats.dequantize(parts, format) - kernel
    assert low < np.sqrt(np.square(error).mean() / np.square(kernel).mean()) < high
    np.testing.assert_allclose(
        _dequantised_in_jax(parts, format), formats.dequantize(parts, format), rtol=2e-7, atol=1e-9
    )


@pytest.mark.parametrize("format", formats.PARTS)
def test_zeros_stay_zeros(format):
    kernel = np.zeros((128, 3), np.float32)
    kernel[70, 1] = 2.0
    found = formats.dequantize(formats.quantize(kernel, format), format)
    np.testing.assert_allclose(found, kernel, atol=1e-6)


def test_what_no_format_can_hold_is_refused():
    with pytest.raises(UserError, match=r"multiples of 64, and a kernel has 96, shape \(96, 4\)"):
        formats.quantize(np.zeros((96, 4), np.float32), "nf4")
    with pytest.raises(UserError, match="not finite"):
        formats.quantize(np.full((64, 4), np.nan, np.float32), "int8")

"""Matrices whose rows NVIDIA GPUs read slowly are padded there, which changes no result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jvlm_kernels.platforms import compiling_for

from jvlm.models import layers
from tests import quick


@pytest.mark.parametrize(
    ("width", "dtype", "extra"), [(3420, "bfloat16", 36), (3420, "float32", 0), (3456, "bfloat16", 0)]
)
def test_rows_of_whole_16_bytes_are_left_alone(width, dtype, extra):
    assert layers.width_padding(width, dtype) == 0  # on a CPU
    with compiling_for("cuda", "9.0"):
        assert layers.width_padding(width, dtype) == extra


@pytest.mark.parametrize("bias", [False, True])
def test_a_padded_mlp_gives_the_same_result_and_gradients(bias):
    precision = layers.Precision(compute_dtype="float32")
    mlp = quick.random_module(lambda: layers.SwiGLU(16, 37, bias=bias, precision=precision, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).standard_normal((3, 16), np.float32)
    graph, state = nnx.split(mlp)

    def run(state, x):
        y = nnx.merge(graph, state)(x)
        return jnp.sin(y).sum(), y

    def shapes_of_products():
        text = str(jax.make_jaxpr(lambda state, x: run(state, x)[0])(state, x))
        return "16,64" in text, "64,16" in text

    plain = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(state, x)
    assert shapes_of_products() == (False, False)
    with compiling_for("cuda", "9.0"):
        assert shapes_of_products() == (True, True)
        padded = jax.jit(lambda state, x: jax.value_and_grad(run, (0, 1), has_aux=True)(state, x))(state, x)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(padded), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

"""Matrix products of 16 bits on a CPU: the numbers of float32 sums, whatever the number of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jvlm_kernels import platforms

from jvlm.models.layers import matmul


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(1, 48), (1, 1, 48), (3, 48), (2, 9, 48), (0, 48), (48,)])
def test_products_are_rounded_sums_and_so_are_gradients(shape, dtype):
    rng = np.random.default_rng(0)
    x, kernel, weights = (jnp.asarray(rng.standard_normal(s), dtype) for s in (shape, (48, 20), (*shape[:-1], 20)))

    @jax.jit
    def pulled(x, kernel, weights):
        y, pull = jax.vjp(matmul, x, kernel)
        return y, *pull(weights)

    exact = [np.asarray(value, np.float64) for value in (x, kernel, weights)]
    rows = [value.reshape(-1, value.shape[-1]) for value in (exact[0], exact[2])]
    expected = [exact[0] @ exact[1], exact[2] @ exact[1].T, rows[0].T @ rows[1]]
    for found, value in zip(pulled(x, kernel, weights), expected, strict=True):
        assert found.dtype == jnp.dtype(dtype)
        assert found.shape == value.shape
        rounding = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(found, np.float64), value, rtol=rounding, atol=1e-4)


def test_a_cpu_is_given_products_of_16_bits_with_results_of_32():
    x, kernel = jnp.ones((1, 8), jnp.bfloat16), jnp.ones((8, 4), jnp.bfloat16)
    (call,) = jax.make_jaxpr(matmul)(x, kernel).jaxpr.eqns
    (dot,) = (e for e in call.params["call_jaxpr"].eqns if e.primitive.name == "dot_general")
    assert dot.outvars[0].aval.dtype == jnp.float32
    assert dot.invars[0].aval.shape == (2, 8)
    with platforms.compiling_for("tpu"):
        (call,) = jax.make_jaxpr(lambda x: matmul(x, kernel))(x).jaxpr.eqns
    (dot,) = (e for e in call.params["call_jaxpr"].eqns if e.primitive.name == "dot_general")
    assert dot.outvars[0].aval.dtype == jnp.bfloat16

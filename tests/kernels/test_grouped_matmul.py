"""Grouped products against one product after the other in numpy, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jvlm_kernels import Unavailable, grouped_matmul
from jvlm_kernels.grouped import tpu
from jvlm_kernels.grouped.api import GroupedSpec

# rows, values of a row and of a result, sizes of groups: within a block, across blocks, empty, and rows of no group
CASES = {
    "several in a block": (200, 48, 80, [30, 0, 70, 41]),
    "several blocks": (700, 32, 144, [300, 5, 257, 138]),
    "one group": (256, 16, 128, [256]),
    "nobody's rows": (300, 64, 16, [0, 130, 0]),
    "no row at all": (40, 16, 16, [0, 0]),
}


def operands(rows, into, out, sizes, dtype=np.float32):
    rng = np.random.default_rng(0)
    x, matrices, d_y = (rng.normal(size=s) for s in ((rows, into), (len(sizes), into, out), (rows, out)))
    return *(jnp.asarray(a, dtype) for a in (x, matrices, d_y)), jnp.asarray(sizes, jnp.int32)


def one_after_the_other(x, matrices, d_y, sizes):
    """(result, gradients by rows and matrices) of the rows that belong to a group."""
    x, matrices, d_y = (np.asarray(a, np.float64) for a in (x, matrices, d_y))
    ends = np.cumsum(sizes)
    spans = [slice(end - size, end) for end, size in zip(ends, np.asarray(sizes), strict=True)]
    y, d_x = np.zeros((ends[-1], d_y.shape[1])), np.zeros((ends[-1], x.shape[1]))
    d_matrices = np.zeros(matrices.shape)
    for group, span in enumerate(spans):
        y[span] = x[span] @ matrices[group]
        d_x[span] = d_y[span] @ matrices[group].T
        d_matrices[group] = x[span].T @ d_y[span]
    return y, d_x, d_matrices


@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu", "xla"])
@pytest.mark.parametrize("case", CASES)
def test_result_and_gradients_equal_one_product_after_the_other(case, implementation):
    rows, into, out, groups = CASES[case]
    if implementation == "pallas_tpu":  # which takes whole lanes
        into, out = (-(-size // 128) * 128 for size in (into, out))
    x, matrices, d_y, sizes = operands(rows, into, out, groups)
    used = int(sizes.sum())
    x = x.at[used:].set(jnp.nan)  # nobody's rows get nowhere, whatever they hold

    def product(x, matrices):
        how = {"implementation": implementation, "interpret": implementation != "xla"}
        return grouped_matmul(x, matrices, sizes, **how)[:used]

    @jax.jit
    def pulled(x, matrices, d_y):
        y, pull = jax.vjp(product, x, matrices)
        return y, *pull(d_y)

    y, d_x, d_matrices = pulled(x if implementation == "pallas_gpu" else x.at[used:].set(0), matrices, d_y[:used])
    for found, expected in zip((y, d_x[:used], d_matrices), one_after_the_other(x, matrices, d_y, sizes), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_the_gradient_on_tpu_is_summed_over_many_blocks_and_nobodys_rows_get_nowhere():
    x, matrices, d_y, sizes = operands(1500, 384, 1536, [700, 0, 300, 1, 0, 299])
    used = int(sizes.sum())
    x, d_y = x.at[used:].set(jnp.nan), d_y.at[used:].set(jnp.nan)
    found = jax.jit(functools.partial(tpu._outer, GroupedSpec(interpret=True)))(x, d_y, sizes, matrices)
    expected = one_after_the_other(x, matrices, d_y, sizes)[2]
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_bfloat16_is_summed_in_float32():
    x, matrices, d_y, sizes = operands(128, 1024, 16, [100, 28], jnp.bfloat16)
    found = grouped_matmul(x, matrices, sizes, implementation="pallas_gpu", interpret=True)
    expected = one_after_the_other(x, matrices, d_y, sizes)[0]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-2)


def test_what_cannot_be_multiplied_is_refused():
    x, matrices, _, sizes = operands(32, 16, 24, [16, 16])
    with pytest.raises(Unavailable, match="multiples of 16, got \\(16, 24\\)"):
        grouped_matmul(x, matrices, sizes, implementation="pallas_gpu", interpret=True)
    with pytest.raises(ValueError, match="rows are float32, matrices bfloat16"):
        grouped_matmul(x, matrices.astype(jnp.bfloat16), sizes)

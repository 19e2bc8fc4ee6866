"""Write one new key of each sequence into a cache [R, K, D, T] on TPU, in place: a Pallas (Mosaic) kernel.

The cache index lies along the lanes of a TPU's registers, and XLA scatters along lanes by transposing the whole cache,
there and back, at every step. This kernel reads the 128 lanes around each index, changes one, and writes them back.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jvlm_kernels import shapes
from jvlm_kernels.attention.block_plan import check_dtypes
from jvlm_kernels.constants import LANES
from jvlm_kernels.errors import Unavailable

PLATFORM = "tpu"


def check(spec, keys, k) -> None:
    """Raise `Unavailable` for a call that the kernel cannot run."""
    check_dtypes(keys, keys, keys, jnp.float32, jnp.bfloat16)
    if spec.paged:
        raise Unavailable("two sequences may name the same page, which this would write twice")
    if k.shape[1] != 1:
        raise Unavailable(f"writes one new token a sequence, got {k.shape[1]}")
    if keys.shape[3] % LANES:
        raise Unavailable(f"needs a cache length that is a multiple of {LANES}, got {keys.shape[3]}")


def write(spec, keys, k, row, index):
    """Return (keys,) with ``k`` [R, 1, K, D] written at ``index`` [R, 1] of each row; out of range is dropped."""
    R, K, D, T = keys.shape
    blocks = T // LANES
    new = jnp.transpose(k.astype(keys.dtype), (0, 2, 3, 1))  # [R, K, D, 1]
    index = index[:, 0]

    def kernel(index, new, before, after):
        at = index[pl.program_id(0)]
        lane = lax.broadcasted_iota(jnp.int32, (D, LANES), 1)
        chosen = lane == at - jnp.minimum(at // LANES, blocks - 1) * LANES
        for h in range(K):  # in float32, the register type of the mask
            value = jnp.where(chosen, new[h].astype(jnp.float32), before[h].astype(jnp.float32))
            after[h] = value.astype(after.dtype)

    def lanes(row, index):
        return row, 0, 0, jnp.minimum(index[row] // LANES, blocks - 1)

    operands = (new, keys)
    out = pl.pallas_call(
        kernel,
        out_shape=shapes.result_type(keys.shape, keys.dtype, (index, *operands)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(R,),
            in_specs=[
                pl.BlockSpec((None, K, D, 1), lambda row, index: (row, 0, 0, 0)),
                pl.BlockSpec((None, K, D, LANES), lanes),
            ],
            out_specs=pl.BlockSpec((None, K, D, LANES), lanes),
        ),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=3 * R * K * D * LANES * keys.dtype.itemsize
        ),
        interpret=spec.interpret,
        name="write_keys",
    )(index, *operands)
    return (out,)

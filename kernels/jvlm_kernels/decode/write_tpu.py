"""Write the new keys of each sequence into a cache [R, K, D, T] on TPU, in place: a Pallas (Mosaic) kernel.

The cache index lies along the lanes of a TPU's registers, and XLA scatters along lanes by transposing the whole cache,
there and back, at every step. This kernel reads the 128 lanes around each index, changes those of the new tokens, and
writes them back. The new tokens of a sequence lie in one such block or in two, in pages or in a row of its own.
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
_MAX_NEW = 16  # each new token is a pass over its block


def check(spec, keys, k) -> None:
    """Raise `Unavailable` for a call that the kernel cannot run."""
    check_dtypes(keys, keys, keys, jnp.float32, jnp.bfloat16)
    if k.shape[1] > _MAX_NEW:
        raise Unavailable(f"writes up to {_MAX_NEW} new tokens a sequence, got {k.shape[1]}; whole pages: write_pages")
    if keys.shape[3] % LANES:
        raise Unavailable(f"needs a cache length or page size that is a multiple of {LANES}, got {keys.shape[3]}")


def write(spec, keys, k, row, index):
    """Return (keys,) with ``k`` [B, S, K, D] written at cache rows and indices [B, S]; out of range is dropped.

    No two sequences may write into one block of lanes, except where nobody reads it: page 0, which sequences beyond
    their table get.
    """
    R, K, D, T = keys.shape
    S, blocks = index.shape[1], T // LANES
    new = k.astype(keys.dtype)[..., None]  # [B, S, K, D, 1]
    inside = (row < R) & (index < T)
    block = jnp.where(row < R, row, 0) * blocks + jnp.minimum(index // LANES, blocks - 1)
    block, lane = block.astype(jnp.int32), jnp.where(inside, index % LANES, -1).astype(jnp.int32)
    # the second visit is of the block that the last token is in, if that is another one
    visits = 1 + (S > 1)
    crosses = inside[:, -1] & (block[:, -1] != block[:, 0])
    visited = jnp.stack([block[:, 0], jnp.where(crosses, block[:, -1], block[:, 0])][:visits], axis=1)
    used = jnp.stack([jnp.ones_like(crosses), crosses][:visits], axis=1).astype(jnp.int32)
    at = jnp.where(block[:, None] == visited[:, :, None], lane[:, None], -1)  # [B, visits, S]

    def kernel(visited, at, used, new, before, after):
        b, u = pl.program_id(0), pl.program_id(1)

        # an unused visit is of the block before it, which is still at hand and written
        @pl.when(used[b * visits + u] > 0)
        def change():
            lane = lax.broadcasted_iota(jnp.int32, (D, LANES), 1)
            for h in range(K):  # in float32, the register type of the mask
                value = before[h].astype(jnp.float32)
                for s in range(S):
                    value = jnp.where(lane == at[(b * visits + u) * S + s], new[s, h].astype(jnp.float32), value)
                after[h] = value.astype(after.dtype)

    def lanes(b, u, visited, at, used):
        block = visited[b * visits + u]
        # neither is negative: // would ask for the sign, and which TPU this is, and a planner has none
        return lax.div(block, blocks), 0, 0, lax.rem(block, blocks)

    operands = (new, keys)
    out = pl.pallas_call(
        kernel,
        out_shape=shapes.result_type(keys.shape, keys.dtype, (index, *operands)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(len(index), visits),
            in_specs=[
                pl.BlockSpec((None, S, K, D, 1), lambda b, u, *_: (b, 0, 0, 0, 0)),
                pl.BlockSpec((None, K, D, LANES), lanes),
            ],
            out_specs=pl.BlockSpec((None, K, D, LANES), lanes),
        ),
        input_output_aliases={4: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=3 * visits * len(index) * K * D * LANES * keys.dtype.itemsize
        ),
        interpret=spec.interpret,
        name="write_keys",
    )(visited.reshape(-1), at.reshape(-1), used.reshape(-1), *operands)
    return (out,)

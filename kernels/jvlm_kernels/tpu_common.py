"""Helpers of the Pallas TPU (Mosaic) kernels: limits of the chip, matrix products, online softmax."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from jvlm_kernels.constants import NEG_INF

VMEM_BYTES = 16 * 1024 * 1024


def dot(a, b, contract: tuple[int, int] = (1, 0)):
    """Return the matrix product over axes ``contract``, accumulated in float32; float32 operands are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


class OnlineSoftmax:
    """Softmax-weighted mean of values over blocks of keys that arrive one at a time (FlashAttention's m, l and acc).

    The three arguments are references to float32 vector memory; `reset` initialises them.

    Args:
      running_max: [heads, Q, LANES], the same in every lane.
      running_sum: [heads, Q, LANES], the same in every lane.
      accumulator: [heads, Q, D].
    """

    def __init__(self, running_max, running_sum, accumulator):
        self.running_max, self.running_sum, self.accumulator = running_max, running_sum, accumulator

    def reset(self) -> None:
        """Start a new block of queries."""
        self.running_max[...] = jnp.full_like(self.running_max, NEG_INF)
        self.running_sum[...] = jnp.zeros_like(self.running_sum)
        self.accumulator[...] = jnp.zeros_like(self.accumulator)

    def update(self, head: int, scores, values) -> None:
        """Add one block of keys: its scores [Q, block] and values [block, D]."""
        previous = self.running_max[head]
        maximum = jnp.maximum(previous, scores.max(1, keepdims=True))
        weights = jnp.exp(scores - maximum[:, :1])
        rescale = jnp.exp(previous - maximum)
        self.running_max[head] = maximum
        self.running_sum[head] = self.running_sum[head] * rescale + weights.sum(1, keepdims=True)
        self.accumulator[head] = self.accumulator[head] * rescale[:, :1] + dot(weights.astype(values.dtype), values)

    def result(self, head: int):
        """Return (mean [Q, D], logsumexp [Q, LANES]); 0 and -inf for queries that attend to no key."""
        attends = self.running_sum[head] > 0
        divisor = jnp.where(attends, self.running_sum[head], 1.0)
        mean = self.accumulator[head] / divisor[:, :1]
        return mean, jnp.where(attends, self.running_max[head] + jnp.log(divisor), -jnp.inf)

"""What the TPU kernels share."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

LANES = 128
VMEM_BYTES = 16 * 1024 * 1024
HIDDEN = -1e30  # of a score that must not be seen
LOWEST = -1e20  # a running maximum begins here, so that exp(HIDDEN - maximum) is 0 in a line that sees nothing


def dot(a, b, contract: tuple[int, int] = (1, 0)):
    """Matrix product summed in float32; float32 operands are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


class OnlineSoftmax:
    """Softmax over keys that come a block at a time: running maximum and total (in all lanes alike), and sums.

    Works on references to vector memory, [heads, Q, LANES] twice and [heads, Q, D].
    """

    def __init__(self, top, total, sums):
        self.top, self.total, self.sums = top, total, sums

    def begin(self) -> None:
        """Of a line that has seen nothing."""
        self.top[...] = jnp.full_like(self.top, LOWEST)
        self.total[...] = jnp.zeros_like(self.total)
        self.sums[...] = jnp.zeros_like(self.sums)

    def add(self, head: int, scores, values) -> None:
        """Scores [Q, block] of a head and the values [block, D] that they weigh."""
        before = self.top[head]
        now = jnp.maximum(before, scores.max(1, keepdims=True))
        weights = jnp.exp(scores - now[:, :1])
        shrink = jnp.exp(before - now)
        self.top[head] = now
        self.total[head] = self.total[head] * shrink + weights.sum(1, keepdims=True)
        self.sums[head] = self.sums[head] * shrink[:, :1] + dot(weights.astype(values.dtype), values)

    def result(self, head: int):
        """(weighted mean of the values [Q, D], logsumexp [Q, LANES]); 0 and -inf where nothing was seen."""
        seen = self.total[head] > 0
        divisor = jnp.where(seen, self.total[head], 1.0)
        return self.sums[head] / divisor[:, :1], jnp.where(seen, self.top[head] + jnp.log(divisor), -jnp.inf)

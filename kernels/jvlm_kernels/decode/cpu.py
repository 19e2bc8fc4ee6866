"""Decode attention on CPU: one sequence after the other, a few pages at a time, with a running softmax.

With all pages of all sequences side by side first, as on devices with fast gathers, they would be copied twice before
the products, which takes several times as long as everything else (`jvlm_kernels.decode.xla`). Small pages are copied
next to each other until there are `ENTRIES`: a product of 64 entries takes little more than twice as long as one of 16.
What a sequence gets does not depend on the sequences beside it.

Shapes as in `jvlm_kernels.decode.api`; X = G * S queries of a key head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jvlm_kernels import shapes
from jvlm_kernels.constants import MASK_VALUE
from jvlm_kernels.errors import Unavailable

PLATFORM = "cpu"
ENTRIES = 64  # of a product


def check(spec, q, keys, values) -> None:
    """Raise `Unavailable` for a cache that is not paged: its products need no copy."""
    if not spec.paged:
        raise Unavailable("it reads pages")


def attend(spec, q, keys, values, lengths, tables):
    """Return (out [B, S, H, D],)."""
    B, S, H, D = q.shape
    K, size = keys.shape[1], keys.shape[3]
    several = max(1, min(ENTRIES // size, tables.shape[1]))
    at_once = several * size
    q_BKXD = jnp.moveaxis(q.reshape(B, S, K, H // K, D), 1, 3).reshape(B, K, -1, D) * spec.scale

    operands = q, keys, values, lengths, tables

    def of_sequence(inputs):
        q_KXD, length, table = inputs
        position_S = length - S + jnp.arange(S)
        pages = jnp.minimum(-(-length // size), tables.shape[1])
        first = jnp.zeros_like(length)
        if spec.window is not None:
            first = jnp.maximum(length - S - spec.window + 1, 0) // at_once

        def read(x, i, axis):
            # behind the last page comes the last page again: masked, and finite if the sequence is
            numbers = [table[jnp.minimum(i * several + n, pages - 1)] for n in range(several)]
            found = [jax.lax.dynamic_index_in_dim(x, number, 0, keepdims=False) for number in numbers]
            return jnp.concatenate(found, axis).astype(q.dtype)

        def with_pages(i, carry):
            best, total, out = carry
            k_KDT, v_KTD = read(keys, i, 2), read(values, i, 1)
            distance_ST = position_S[:, None] - i * at_once - jnp.arange(at_once)
            visible_ST = distance_ST >= 0
            if spec.window is not None:
                visible_ST &= distance_ST < spec.window
            scores = jnp.einsum("kxd,kdt->kxt", q_KXD, k_KDT, preferred_element_type=jnp.float32)
            scores = jnp.where(jnp.tile(visible_ST, (H // K, 1)), scores, MASK_VALUE)
            new = jnp.maximum(best, scores.max(-1, keepdims=True))
            weights, before = jnp.exp(scores - new), jnp.exp(best - new)
            added = jnp.einsum("kxt,ktd->kxd", weights.astype(q.dtype), v_KTD, preferred_element_type=jnp.float32)
            return new, total * before + weights.sum(-1, keepdims=True), out * before + added

        zeros = jnp.zeros(q_KXD.shape, jnp.float32)
        start = shapes.mark_varying_like((zeros[..., :1] + MASK_VALUE, zeros[..., :1], zeros), operands)
        _, total, out = jax.lax.fori_loop(first, -(-pages // several), with_pages, start)
        out = out / jnp.where(total > 0, total, 1.0)  # nothing was added for a row without a sequence
        out_SHD = jnp.moveaxis(out.reshape(K, H // K, S, D), 2, 0).reshape(S, H, D)
        return jnp.where(position_S[:, None, None] >= 0, out_SHD, 0.0).astype(q.dtype)

    return (jax.lax.map(of_sequence, (q_BKXD, lengths, tables)),)

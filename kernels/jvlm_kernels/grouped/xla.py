"""Grouped matrix multiplication by XLA: every row times every matrix, but for two of the three products on TPU."""

from __future__ import annotations

import jax
from jax import lax

PLATFORM = None


def check(spec, x, matrices) -> None:
    """Accept every call."""


def forward(spec, x, matrices, sizes):
    """Return (y [N, F],)."""
    return (lax.ragged_dot(x, matrices, sizes),)


def backward(spec, x, matrices, sizes, d_y):
    """Return (dx, d_matrices)."""
    return jax.vjp(lambda x, matrices: lax.ragged_dot(x, matrices, sizes), x, matrices)[1](d_y)

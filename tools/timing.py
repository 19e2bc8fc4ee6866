"""Timing of compiled functions, for the programs in this folder."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax


def seconds(function: Callable, operands, rounds: int) -> float:
    """Median time of a call, after one that is not counted."""
    jax.block_until_ready(function(*operands))
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(function(*operands))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)

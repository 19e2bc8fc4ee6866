"""Timing and parallel compilation of jitted functions, for the programs in this folder."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


def seconds(function: Callable, operands: Sequence[Any], rounds: int, calls: int = 1) -> float:
    """Return the median time of a call over ``rounds``, after one call that is not counted.

    A round is ``calls`` calls which the device runs back to back, so that the time to start one is hidden.
    """
    jax.block_until_ready(function(*operands))
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            result = function(*operands)
        jax.block_until_ready(result)
        taken.append((time.perf_counter() - began) / calls)
    return statistics.median(taken)


def compile_all(functions: Sequence[tuple[Callable, Sequence[Any]]], errors: tuple[type[Exception], ...]) -> list[Any]:
    """Compile (function, operands) pairs side by side; an entry is the compiled program, or one of ``errors``."""

    def compile_one(pair: tuple[Callable, Sequence[Any]]) -> Any:
        function, operands = pair
        try:
            return jax.jit(function).lower(*operands).compile()
        except errors as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, functions))

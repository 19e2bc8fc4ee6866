"""The host's memory, where the host is the device."""

from __future__ import annotations

import ctypes
import importlib.util
import os

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next allocation where the CPU is JAX's only device.

    XLA allocates the buffers of a step anew each time. By default glibc maps each large one and unmaps it again, so
    that the system zeroes all its pages in every step: a quarter of the demo's CPU time. One arena, because the next
    step may be run by another thread. Call it before any thread starts. Returns whether it did anything; it does not
    with another C library, nor beside an accelerator, where host threads should not wait for one another.
    """
    if not _cpu_is_the_only_device():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; on Windows there is no such handle
        return False
    return all(mallopt(name, value) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)))


def _cpu_is_the_only_device() -> bool:
    """As JAX will find it, without starting JAX."""
    asked = os.environ.get("JAX_PLATFORMS")
    if asked:
        return asked == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))

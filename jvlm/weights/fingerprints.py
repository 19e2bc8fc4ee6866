"""Fingerprints of arrays: the same on every mesh, another if any bit changes.

They are saved beside the arrays of a checkpoint and compared with what is read: a disk or a copy that changed a bit is
noticed, which zstd and OCDBT alone do not do.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_BLOCK = 1 << 20  # elements that `Running` takes at a time, so that it needs little memory of its own


def fingerprints(tree: Any) -> dict[str, int]:
    """Return a number for each array of a tree, by its path; computed where the arrays lie.

    Raises:
      TypeError: complex arrays, which no device turns into bits.
    """
    leaves = [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]
    for path, x in leaves:
        if jnp.iscomplexobj(x):
            raise TypeError(f"{path} is {x.dtype}: complex arrays have no fingerprint; keep their two parts instead")
    # where the arrays lie in host memory, nothing needs to be compiled
    own = {path: _of_host_array(np.asarray(x)) for path, x in leaves if _in_host_memory(x)}
    others = {path: x for path, x in leaves if path not in own}
    own.update((path, int(n)) for path, n in (_sums(others) if others else {}).items())
    return {path: own[path] for path, _ in leaves}


def _in_host_memory(x: jax.Array) -> bool:
    devices = x.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu" and not _is_packed(x)


def _is_packed(x: jax.Array) -> bool:
    """Whether several elements share a byte on a device."""
    return jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _fingerprint(x) for path, x in arrays.items()}


def _fingerprint(x: jax.Array) -> jax.Array:
    """Sum of the elements' bits, each times an odd number of its own, modulo 2 ** 32: no single change leaves it."""
    bits = _bits(x)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """Unsigned numbers of at most 32 bits; elements of 8 bytes become two, on a last axis."""
    if x.dtype == bool or _is_packed(x):
        return x.astype(jnp.uint8)
    return lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))


def _of_host_array(value: np.ndarray) -> int:
    running = Running()
    running.add(value)
    return running.value


class Running:
    """The fingerprint of one array in host memory, of which parts come in order."""

    def __init__(self):
        self.value, self._elements = 0, 0

    def add(self, part: np.ndarray) -> None:
        """Take the next elements, in C order."""
        flat = np.ascontiguousarray(part).reshape(-1)
        flat = flat.view({1: np.uint8, 2: np.uint16}.get(flat.dtype.itemsize, np.uint32))
        for start in range(0, len(flat), _BLOCK):
            bits = flat[start : start + _BLOCK].astype(np.uint32)
            first = (self._elements + start) % 2**32
            index = np.arange(first, first + len(bits), dtype=np.uint64).astype(np.uint32)
            self.value = (self.value + int(np.sum(bits * (2 * index + 1), dtype=np.uint32))) % 2**32
        self._elements += len(flat)

"""Fingerprints of arrays: the same on every mesh, another if any bit changes.

They are saved beside the arrays of a checkpoint and compared with what is read: a disk or a copy that changed a bit is
noticed, which zstd and OCDBT alone do not do.

A number says how it was made. Below 2**32 it is of version 1 (jvlm 0.2.0), a sum of bits times odd numbers: no single
change leaves it, but of many arrays x, 2 x and -x have the same. From 2**32 on it is of version 2, a sum of mixed bits.
Old ones are still compared, as they were made.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped, UInt32

NEWEST = 2
_BLOCK = 1 << 16  # elements that `Running` takes at a time: what it works on stays in a core's cache
# of fmix32, with which MurmurHash3 ends: shift to the right, and factor after it; then the last shift
_MIX, _LAST_SHIFT = ((16, 0x85EBCA6B), (13, 0xC2B2AE35)), 16
_GOLDEN = 0x9E3779B1  # tells an element's place; a prime near 2**32 times the golden ratio


def version_of(values: Iterable[int]) -> int:
    """Return the version that fingerprints are of; the newest where there are none."""
    return 1 if any(value < 2**32 for value in values) else NEWEST


def digest(values: Mapping[str, int]) -> str:
    """Return one fingerprint of the fingerprints of several arrays, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(values.items())).encode()).hexdigest()[:16]


def fingerprints(tree: Any, *, version: int = NEWEST) -> dict[str, int]:
    """Return a number for each array of a tree, by its path; computed where the arrays lie.

    Args:
      version: `version_of` the numbers that they are to be compared with.

    Raises:
      TypeError: complex arrays, which no device turns into bits.
    """
    leaves = [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]
    for path, x in leaves:
        if jnp.iscomplexobj(x):
            raise TypeError(f"{path} is {x.dtype}: complex arrays have no fingerprint; keep their two parts instead")
    # where the arrays lie in host memory, nothing needs to be compiled
    own = {path: _of_host_array(np.asarray(x), version) for path, x in leaves if _in_host_memory(x)}
    others = {path: x for path, x in leaves if path not in own}
    sums = _sums(others, version) if others else {}
    own.update((path, _numbered(int(n), version)) for path, n in sums.items())
    return {path: own[path] for path, _ in leaves}


def _in_host_memory(x: jax.Array) -> bool:
    devices = x.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu" and not _is_packed(x)


def _is_packed(x: jax.Array) -> bool:
    """Whether several elements share a byte on a device."""
    return jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8


def _numbered(total: int, version: int) -> int:
    return total + (2**32 if version > 1 else 0)


@functools.partial(jax.jit, static_argnums=1)
def _sums(arrays: dict[str, jax.Array], version: int) -> dict[str, jax.Array]:
    return {path: mixed_sum(x) if version > 1 else _sum_of_products(x) for path, x in arrays.items()}


def mixed_sum(x: Shaped[Array, "*L"]) -> UInt32[Array, ""]:
    """Return the sum of the elements' bits, each mixed with its place (`fmix32`), modulo 2**32.

    It is a uint32, the same on every device. A change of any one element changes it; other changes leave it with a
    chance of one in 2**32.
    """
    bits = _bits(x)
    mixed = bits.astype(jnp.uint32) + (_places(bits.shape) + 1) * jnp.uint32(_GOLDEN)
    for shift, factor in _MIX:
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> _LAST_SHIFT), dtype=jnp.uint32)


def _sum_of_products(x: jax.Array) -> jax.Array:
    """Return the sum of the elements' bits, each times an odd number of its own, modulo 2**32 (version 1)."""
    bits = _bits(x)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * _places(bits.shape) + 1), dtype=jnp.uint32)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """Return the place of each element in C order, modulo 2**32."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _bits(x: jax.Array) -> jax.Array:
    """Unsigned numbers of at most 32 bits; elements of 8 bytes become two, on a last axis."""
    if x.dtype == bool or _is_packed(x):
        return x.astype(jnp.uint8)
    return lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))


def _of_host_array(value: np.ndarray, version: int) -> int:
    running = Running(version)
    running.add(value)
    return running.value


class Running:
    """The fingerprint of one array in host memory, of which parts come in order.

    Args:
      version: `version_of` the number that it is to be compared with.
    """

    def __init__(self, version: int = NEWEST):
        self._version, self._sum, self._elements = version, 0, 0

    @property
    def value(self) -> int:
        """Of what has come until now."""
        return _numbered(self._sum, self._version)

    def add(self, part: np.ndarray) -> None:
        """Take the next elements, in C order."""
        flat = np.ascontiguousarray(part).reshape(-1)
        flat = flat.view({1: np.uint8, 2: np.uint16}.get(flat.dtype.itemsize, np.uint32))
        of_block = _mixed_sum_of_block if self._version > 1 else _sum_of_products_of_block
        for start in range(0, len(flat), _BLOCK):
            bits = flat[start : start + _BLOCK].astype(np.uint32)
            first = (self._elements + start) % 2**32
            places = np.arange(first, first + len(bits), dtype=np.uint64).astype(np.uint32)
            self._sum = (self._sum + of_block(bits, places)) % 2**32
        self._elements += len(flat)


def _mixed_sum_of_block(bits: np.ndarray, places: np.ndarray) -> int:
    """As `mixed_sum`; overwrites both arrays."""
    places += np.uint32(1)
    places *= np.uint32(_GOLDEN)
    mixed, shifted = np.add(bits, places, out=places), bits
    for shift, factor in _MIX:
        mixed ^= np.right_shift(mixed, shift, out=shifted)
        mixed *= np.uint32(factor)
    mixed ^= np.right_shift(mixed, _LAST_SHIFT, out=shifted)
    return int(np.sum(mixed, dtype=np.uint32))


def _sum_of_products_of_block(bits: np.ndarray, places: np.ndarray) -> int:
    return int(np.sum(bits * (2 * places + 1), dtype=np.uint32))

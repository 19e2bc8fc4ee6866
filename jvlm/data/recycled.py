"""Large arrays in memory that earlier ones have used: a new page costs more time than writing to it."""

from __future__ import annotations

import collections
import itertools
import math
import mmap
import os
import threading
import weakref
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

_KEPT = 4  # buffers of one size
_OPENED = 8  # buffers of another process that stay mapped
_LOCK = threading.Lock()
_FREE: dict[tuple[int, bool], list[Any]] = collections.defaultdict(list)


def recycled(shape: tuple[int, ...], *, is_shared: bool = False) -> UInt8[np.ndarray, "..."]:
    """Return a uint8 array whose values mean nothing.

    Its memory is used again once nothing refers to it any more: neither the array, nor a view, nor JAX, which on a CPU
    may compute on the very memory and holds the array meanwhile.

    Args:
      is_shared: whether processes that know its `shared_location` can write to it; where the system lacks such memory,
        it is as any other.
    """
    key = math.prod(shape), is_shared
    with _LOCK:
        buffer = _FREE[key].pop() if _FREE[key] else None
        for other in list(_FREE):
            if other != key:
                del _FREE[other]
    if buffer is None:
        buffer = _shared_buffer(key[0]) if is_shared and hasattr(os, "memfd_create") and key[0] else bytearray(key[0])
    array = np.ndarray(shape, np.uint8, buffer)
    weakref.finalize(array, _give_back, buffer, key).atexit = False
    return array


def _give_back(buffer: Any, key: tuple[int, bool]) -> None:
    # a plain list, and no lock: the garbage collector may run this while this thread holds it
    if len(_FREE[key]) < _KEPT:
        _FREE[key].append(buffer)


class SharedLocation(NamedTuple):
    """Where an array is in memory that processes share: ``serial`` is another one for each buffer."""

    path: str
    serial: int
    size: int
    offset: int
    shape: tuple[int, ...]


_SERIALS = itertools.count()
_SHARED: weakref.WeakKeyDictionary[mmap.mmap, SharedLocation] = weakref.WeakKeyDictionary()


def _shared_buffer(size: int) -> mmap.mmap:
    """Memory without a name, which is gone when no process has it open, however these end."""
    file = os.memfd_create("jvlm-batch")
    os.ftruncate(file, size)
    buffer = mmap.mmap(file, size)
    _SHARED[buffer] = SharedLocation(f"/proc/{os.getpid()}/fd/{file}", next(_SERIALS), size, 0, ())
    weakref.finalize(buffer, os.close, file)
    return buffer


def shared_location(array: Shaped[np.ndarray, "..."]) -> SharedLocation | None:
    """Return where a contiguous array is, for `opened` in another process; None if its memory is not shared."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    known = _SHARED.get(base) if isinstance(base, mmap.mmap) else None
    if known is None:
        return None
    begin = np.frombuffer(base, np.uint8).__array_interface__["data"][0]
    return known._replace(offset=array.__array_interface__["data"][0] - begin, shape=array.shape)


_MAPPED: collections.OrderedDict[tuple[str, int], mmap.mmap] = collections.OrderedDict()


def opened(location: SharedLocation) -> Shaped[np.ndarray, "..."]:
    """Return an array of a process that lives and holds it."""
    key = location.path, location.serial
    if key not in _MAPPED:
        file = os.open(location.path, os.O_RDWR)
        try:
            _MAPPED[key] = mmap.mmap(file, location.size)
        finally:
            os.close(file)
        if len(_MAPPED) > _OPENED:
            _MAPPED.popitem(last=False)
    _MAPPED.move_to_end(key)
    return np.ndarray(location.shape, np.uint8, _MAPPED[key], location.offset)


_SCRATCH = threading.local()


def scratch(name: str, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    """Return a uint8 array of this thread, whose values mean nothing, until the thread asks for the same name again."""
    size = math.prod(shape)
    held = _SCRATCH.__dict__.get(name)
    if held is None or len(held) < size:
        held = _SCRATCH.__dict__[name] = np.empty(size, np.uint8)
    return held[:size].reshape(shape)

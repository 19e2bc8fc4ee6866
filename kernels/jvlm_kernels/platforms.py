"""Choosing among implementations of one operation: by device, dtype and shape, at the latest possible moment."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType

import jax
import jax.numpy as jnp

from jvlm_kernels.errors import Unavailable


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation and the modules that implement it, best first.

    A module offers ``check(spec, *operands)``, which raises `Unavailable` with the reason; functions
    ``f(spec, *arrays) -> tuple of arrays``; and ``PLATFORM``, where it runs: "tpu", "cuda", or None for everywhere.

    Attributes:
      by_name: implementations that run only where they are asked for by name.
      rows: whether all arrays begin with the axis of rows, so that `jax.vmap` can make the mapped axis more rows.
    """

    name: str
    modules: Mapping[str, str]
    by_name: frozenset[str] = frozenset()
    rows: bool = True

    def runnable(self, implementation: str | None, interpret: bool, spec, *operands) -> tuple[str, ...]:
        """The first implementation for each platform; the one asked for alone, if one is.

        Raises:
          ValueError: an unknown implementation, or none to interpret.
          Unavailable: nothing can run this call; with the reason of each.
        """
        if implementation is None:
            if interpret:
                raise ValueError("interpret needs an implementation by name")
            names = tuple(name for name in self.modules if name not in self.by_name)
        elif implementation in self.modules:
            names = (implementation,)
        else:
            raise ValueError(f"unknown implementation {implementation!r}; known: {', '.join(self.modules)}")
        chosen: dict[str | None, str] = {}
        reasons = []
        for name in names:
            platform = module(self.modules[name]).PLATFORM
            if platform in chosen:
                continue
            try:
                module(self.modules[name]).check(spec, *operands)
                if implementation is not None and not interpret:
                    _check_device(platform)
            except Unavailable as reason:
                reasons.append(f"{name}: {reason}")
            else:
                chosen[platform] = name
                if platform is None:
                    break
        if not chosen or (implementation is None and None not in chosen):
            raise Unavailable(f"no implementation of {self.name} can run this call: " + "; ".join(reasons))
        return tuple(chosen.values())

    def run(self, spec, names: tuple[str, ...], function: str, *arrays) -> tuple[jax.Array, ...]:
        """``function`` of the implementation for the platform that is compiled for, one of ``names``."""
        choices = {module(self.modules[n]).PLATFORM: _function(self, spec, n, function) for n in names}
        default = choices.pop(None, None)
        if default is None:
            (only,) = choices.values()
            return only(*arrays)
        return jax.lax.platform_dependent(*arrays, **choices, default=default) if choices else default(*arrays)

    def __hash__(self) -> int:
        return hash(self.name)


def module(path: str) -> ModuleType:
    """An implementation, imported when it is first wanted."""
    return importlib.import_module(path)


_ahead: contextvars.ContextVar[str | None] = contextvars.ContextVar("ahead", default=None)


@contextlib.contextmanager
def compiling_for(platform: str):
    """Implementations for ``platform`` can be asked for by name, to compile ahead of time where it is absent."""
    token = _ahead.set(platform)
    try:
        yield
    finally:
        _ahead.reset(token)


def _check_device(platform: str | None) -> None:
    """An implementation asked for by name must suit the device at hand, or the one that is compiled for."""
    here = _ahead.get() or {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in (None, here):
        raise Unavailable(
            f"runs on {platform}, the device here is {here} (when compiling ahead of time for {platform}, leave the "
            f"implementation to be chosen or name it inside `jvlm_kernels.platforms.compiling_for`; or interpret it)"
        )


@functools.cache
def _function(operation: Operation, spec, name: str, function: str) -> Callable:
    """An implementation's function; where it can, its batching rule makes the mapped axis more rows."""
    compute = getattr(module(operation.modules[name]), function)

    def call(*arrays):
        with jax.named_scope(f"{operation.name}_{name}_{function}"):
            return tuple(compute(spec, *arrays))

    if not operation.rows:
        return call
    call = jax.custom_batching.custom_vmap(call)

    @call.def_vmap
    def fold(size, mapped, *arrays):
        arrays = [
            x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_mapped in zip(arrays, mapped, strict=True)
        ]
        outputs = call(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in outputs), (True,) * len(outputs)

    return call

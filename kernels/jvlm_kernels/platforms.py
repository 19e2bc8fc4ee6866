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
    ``f(spec, *arrays) -> tuple of arrays``; and ``PLATFORM``, where it runs: "tpu", "cuda", or None for everywhere. It
    may also offer ``check_automatic(spec, *operands)``: the reasons not to take it for a call that names nobody.

    Attributes:
      rows: whether all arrays begin with the axis of rows, so that `jax.vmap` can make the mapped axis more rows.
    """

    name: str
    modules: Mapping[str, str]
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
            names = tuple(self.modules)
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
                if implementation is None:
                    getattr(module(self.modules[name]), "check_automatic", _no_objection)(spec, *operands)
                elif not interpret:
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


def _no_objection(*_) -> None:
    """Of a module that may be taken wherever it runs."""


# (platform, compute capability) that `compiling_for` names
_ahead: contextvars.ContextVar[tuple[str, str | None] | None] = contextvars.ContextVar("ahead", default=None)


@contextlib.contextmanager
def compiling_for(platform: str, capability: str | None = None):
    """Compile ahead of time for a device that is absent, with the implementations that it would get.

    Args:
      platform: "tpu" or "cuda". Implementations for it can be asked for by name.
      capability: compute capability of the NVIDIA GPU, such as "9.0", which some implementations are chosen by.
    """
    token = _ahead.set((platform, capability))
    try:
        yield
    finally:
        _ahead.reset(token)


def target_platform() -> str:
    """Return "cuda", "tpu" or "cpu": what `compiling_for` names, or the devices at hand."""
    ahead = _ahead.get()
    return ahead[0] if ahead else {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def compute_capability() -> str | None:
    """Return the compute capability of the NVIDIA GPU compiled for, or at hand; None if that is not known."""
    ahead = _ahead.get()
    if ahead is not None:
        return ahead[1]
    return getattr(jax.devices()[0], "compute_capability", None) if jax.default_backend() == "gpu" else None


def _check_device(platform: str | None) -> None:
    """An implementation asked for by name must suit the device at hand, or the one that is compiled for."""
    here = target_platform()
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

"""Choice among implementations of an operation, by device, dtype and shape.

A program is traced for one platform: that of the devices at hand, or the one given to `compiling_for`. With an
accelerator at hand the implementation for every device is traced too, because the program may be run on the machine's
CPU; the choice falls when XLA lowers it.
"""

from __future__ import annotations

import contextlib
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
    """An operation and the modules that implement it, in order of preference.

    A module has ``check(spec, *operands)``, which raises `Unavailable` with the reason; functions ``f(spec, *arrays)``
    that return a tuple of arrays; and ``PLATFORM``, where it runs: "tpu", "cuda", "cpu", or None for every device. It
    may also have ``check_automatic(spec, *operands)``, which raises `Unavailable` for calls that should get it only by
    name.

    Attributes:
      name: of the operation, in error messages and profiles.
      modules: module path of each implementation, by the implementation's name.
      batched: whether all arrays start with the batch axis, so that `jax.vmap` can fold the mapped axis into it.
    """

    name: str
    modules: Mapping[str, str]
    batched: bool = True

    def runnable(self, implementation: str | None, interpret: bool, spec, *operands) -> tuple[str, ...]:
        """Return the names of the implementations to compile: the first that can run on each platform.

        With an ``implementation``, return that one alone.

        Raises:
          ValueError: an unknown implementation, or ``interpret`` without one.
          Unavailable: nothing can run this call; the message gives the reason of each.
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
            platform = load(self.modules[name]).PLATFORM
            if platform in chosen:
                continue
            try:
                load(self.modules[name]).check(spec, *operands)
                if implementation is None:
                    getattr(load(self.modules[name]), "check_automatic", _accept)(spec, *operands)
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
        """Call ``function`` of the implementation, one of ``names``, for the platform that is compiled for."""
        choices = {load(self.modules[n]).PLATFORM: _function(self, spec, n, function) for n in names}
        default = choices.pop(None, None)
        if default is None:
            (only,) = choices.values()
            return only(*arrays)
        return platform_dependent(*arrays, default=default, **choices)

    def __hash__(self) -> int:
        return hash(self.name)


def load(path: str) -> ModuleType:
    """Return an implementation's module, imported on first use."""
    return importlib.import_module(path)


def _accept(*_) -> None:
    """Accept every call: the default ``check_automatic``."""


# (platform, compute capability) given to `compiling_for`; what was traced for another is not taken for it
_target = jax.make_user_context(None)


@contextlib.contextmanager
def compiling_for(platform: str, capability: str | None = None):
    """Compile ahead of time for a device that is absent, with the implementations that it would get.

    Args:
      platform: "tpu" or "cuda". Implementations for it can be requested by name.
      capability: compute capability of the NVIDIA GPU, such as "9.0", which some implementations need.
    """
    with _target((platform, capability)):
        yield


def target_platform() -> str:
    """Return "cuda", "tpu" or "cpu": the platform given to `compiling_for`, or that of the available devices."""
    target = _target.value
    return target[0] if target else {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def compute_capability() -> str | None:
    """Return the compute capability of the NVIDIA GPU compiled for, or available; None if it is not known."""
    target = _target.value
    if target is not None:
        return target[1]
    return getattr(jax.devices()[0], "compute_capability", None) if jax.default_backend() == "gpu" else None


def platform_dependent(*arrays, default: Callable, **choices: Callable):
    """As `jax.lax.platform_dependent`, but branches of platforms that are not compiled for are not traced.

    Kernels that are never run took more than half of the time to trace and lower a training step on a CPU.
    """
    platform = target_platform()
    own = choices.get(platform, default)
    if own is default or platform == "cpu" or _target.value is not None:
        return own(*arrays)
    return jax.lax.platform_dependent(*arrays, default=default, **{platform: own})


def _check_device(platform: str | None) -> None:
    """Raise `Unavailable` unless the device, or the one that is compiled for, is of this platform."""
    here = target_platform()
    if platform not in (None, here):
        raise Unavailable(
            f"runs on {platform}, the device here is {here} (to compile ahead of time for {platform}, leave the "
            f"implementation to be chosen or name it inside `jvlm_kernels.platforms.compiling_for`; or interpret it)"
        )


@functools.cache
def _function(operation: Operation, spec, name: str, function: str) -> Callable:
    """Return an implementation's function, with a batching rule that folds a mapped axis into the batch axis."""
    compute = getattr(load(operation.modules[name]), function)

    def call(*arrays):
        with jax.named_scope(f"{operation.name}_{name}_{function}"):
            return tuple(compute(spec, *arrays))

    if not operation.batched:
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

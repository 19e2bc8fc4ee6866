"""The modules of encoders, connectors, decoders and their MLPs, by the type of their configuration."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from flax import nnx

from jvlm.models import contracts

_BUILDERS: dict[type, Callable[..., nnx.Module]] = {}


def register(config_type: type) -> Callable[[type], type]:
    """Return a class decorator: ``@register(QwenViTConfig)`` on the module that a ``QwenViTConfig`` builds.

    Raises:
      TypeError: the configuration or the module lacks members of its contract; the message names each.
    """

    def add(module_type: type) -> type:
        lacking = contracts.problems(config_type, module_type)
        if lacking:
            raise TypeError("\n  ".join([f"{module_type.__name__} cannot be registered; it lacks", *lacking]))
        _BUILDERS[config_type] = module_type
        return module_type

    return add


def build(config: Any, **kwargs: Any) -> nnx.Module:
    """Return the module of a configuration. Raises KeyError naming the known types."""
    load_all()
    if type(config) not in _BUILDERS:
        raise KeyError(
            f"nothing is registered for {type(config).__name__}; known: {sorted(kind.__name__ for kind in _BUILDERS)}"
        )
    return _BUILDERS[type(config)](config, **kwargs)


def load_all() -> None:
    """Import every file of the folders, so that adding an architecture only adds files."""
    for folder in ("encoders", "connectors", "decoders"):
        package = importlib.import_module(f"jvlm.models.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")

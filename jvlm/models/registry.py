"""The modules of encoders, connectors, decoders and their MLPs, by the type of their configuration."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from flax import nnx

from jvlm.errors import UserError
from jvlm.models import contracts

_BUILDERS: dict[type, Callable[..., nnx.Module]] = {}
_BY_NAME: dict[str, type] = {}


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
        _BY_NAME[config_type.__name__] = config_type
        return module_type

    return add


def build(config: Any, **kwargs: Any) -> nnx.Module:
    """Return the module of a configuration. Raises KeyError naming the known types."""
    load_all()
    if type(config) not in _BUILDERS:
        raise KeyError(f"nothing is registered for {type(config).__name__}; known: {sorted(_BY_NAME)}")
    return _BUILDERS[type(config)](config, **kwargs)


def config_type(name: str) -> type:
    """Return the configuration class of a name that a run folder stores. Raises UserError for an unknown name."""
    load_all()
    if name not in _BY_NAME:
        raise UserError(f"unknown configuration {name!r}; known: {sorted(_BY_NAME)}")
    return _BY_NAME[name]


def is_registered(name: str) -> bool:
    """Return whether a configuration of this name is known."""
    load_all()
    return name in _BY_NAME


def load_all() -> None:
    """Import every file of the folders, so that adding an architecture only adds files."""
    for folder in ("encoders", "connectors", "decoders"):
        package = importlib.import_module(f"jvlm.models.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")

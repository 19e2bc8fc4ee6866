"""Small registries: encoders, connectors, decoders and their MLPs, found by the type of their configuration."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from flax import nnx

from jvlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Base of every encoder configuration."""


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Base of every connector configuration."""

    @property
    def frame_features(self) -> int | None:
        """Features that a frame gives whatever its size; None where the number follows from the frame's patches."""
        return None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Base of every decoder configuration."""


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Base of what a decoder layer may have in place of the dense SwiGLU (a mixture of experts, say).

    Its module lies in ``decoders``, is built with ``width=`` and called with (x [B, S, D], segments [B, S]); it returns
    (y [B, S, D], a dict of arrays to report, which may be empty). Padding has segment 0.

    Attributes:
      every: every n-th layer has it, the n-th being the first.
    """

    every: int = 1


_BUILDERS: dict[type, Callable[..., nnx.Module]] = {}
_BY_NAME: dict[str, type] = {}


def register(config_type: type) -> Callable[[type], type]:
    """Class decorator: ``@register(QwenViTConfig)`` on the module that a ``QwenViTConfig`` builds."""

    def add(module_type: type) -> type:
        _BUILDERS[config_type] = module_type
        _BY_NAME[config_type.__name__] = config_type
        return module_type

    return add


def build(config: Any, **kwargs: Any) -> nnx.Module:
    """The module of a configuration. Raises KeyError naming the known types."""
    load_all()
    if type(config) not in _BUILDERS:
        raise KeyError(f"nothing is registered for {type(config).__name__}; known: {sorted(_BY_NAME)}")
    return _BUILDERS[type(config)](config, **kwargs)


def config_type(name: str) -> type:
    """The configuration class of a registered name, as stored in run folders. Raises UserError for another name."""
    load_all()
    if name not in _BY_NAME:
        raise UserError(f"unknown configuration {name!r}; known: {sorted(_BY_NAME)}")
    return _BY_NAME[name]


def load_all() -> None:
    """Import every file of the folders, so that adding an architecture only adds files."""
    for folder in ("encoders", "connectors", "decoders"):
        package = importlib.import_module(f"jvlm.models.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")

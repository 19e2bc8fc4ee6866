"""Finding families: those in this folder, and those that other installed packages announce by entry point."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from jvlm.errors import UserError
from jvlm.families.base import Family

if TYPE_CHECKING:
    from jvlm.data.image_processor import Limit
    from jvlm.models.vlm import VLMConfig

ENTRY_POINTS = "jvlm.families"
_OUTSIDE = f"a family of another package needs an entry point in the group {ENTRY_POINTS!r}"
T = TypeVar("T")


def names() -> tuple[str, ...]:
    """Return the names of all families, without importing them."""
    return tuple(sorted({*_built_in_names(), *(point.name for point in _entry_points())}))


def get(name: str) -> Family:
    """Return a family by name.

    Raises:
      UserError: naming the known families; or the package, where its family cannot be loaded.
    """
    if name in _built_in_names():
        return _built_in(name)
    for point in _entry_points():
        if point.name == name:
            return _outside(point)
    raise _unknown("model family", name, names())


def for_model_type(model_type: str | None) -> Family:
    """Return the family of a ``model_type`` in config.json.

    Raises:
      UserError: naming what is supported.
    """
    known = _first(family for family in _all() if family.hf is not None and model_type in family.hf.model_types)
    if known is None:
        raise UserError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(model_types())}; {_OUTSIDE}"
        )
    return known


def of_language_models() -> Family:
    """Return the family of models of text alone, which are made from a language model's folder."""
    found = _first(family for family in _all() if family.text_config is not None)
    if found is None:
        raise RuntimeError("no family has a text_config")
    return found


def model_types() -> tuple[str, ...]:
    """Return every ``model_type`` that a family reads."""
    return tuple(sorted(kind for family in _all() if family.hf is not None for kind in family.hf.model_types))


def presets() -> dict[str, VLMConfig]:
    """Return the published sizes of all families."""
    return {name: config for family in _all() for name, config in family.presets.items()}


def preset(name: str) -> VLMConfig:
    """Return a published size by name. Raises UserError naming the known ones."""
    config = _first(family.presets[name] for family in _all() if name in family.presets)
    if config is None:
        raise _unknown("preset", name, sorted(presets()))
    return config


def image_limits() -> dict[str, tuple[Limit, tuple[str, ...]]]:
    """Return what image processors let examples and the command line change: field to limit, and the families of it."""
    result: dict[str, tuple[Limit, tuple[str, ...]]] = {}
    for family in _all():
        for name, limit in family.image_config.limits.items():
            first, owners = result.get(name, (limit, ()))
            result[name] = first, (*owners, family.name)
    return result


def load_all(until: Callable[[], bool] = lambda: False) -> None:
    """Import families, built-in ones first, so that the types of their configurations are known.

    Args:
      until: stops the import as soon as it is true: a package that cannot be loaded is then not asked for.
    """
    families = _all()
    while not until() and next(families, None) is not None:
        pass


def _all() -> Iterator[Family]:
    """Built-in families first: a package that cannot be loaded must not be in their way."""
    for name in _built_in_names():
        yield _built_in(name)
    for point in _entry_points():
        yield _outside(point)


def _first(candidates: Iterable[T]) -> T | None:
    return next(iter(candidates), None)


@functools.cache
def _built_in_names() -> tuple[str, ...]:
    package = importlib.import_module("jvlm.families")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg))


def _built_in(name: str) -> Family:
    return importlib.import_module(f"jvlm.families.{name}").FAMILY


def _entry_points() -> list[metadata.EntryPoint]:
    return sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda point: point.name)


@functools.cache
def _outside(point: metadata.EntryPoint) -> Family:
    package = point.dist.name if point.dist is not None else point.module
    where = f"family {point.name!r} of the package {package} ({point.value})"
    if point.name in _built_in_names():
        raise UserError(f"{where} has the name of a family of jvlm: rename it, or remove the package")
    try:
        family = point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where} cannot be loaded: {error}. Correct or remove the package") from error
    if not isinstance(family, Family) or family.name != point.name:
        value = f"the family {family.name!r}" if isinstance(family, Family) else f"a {type(family).__name__}"
        raise UserError(f"{where} is {value}; the entry point must name a Family of the same name")
    return family


def _unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"did you mean {near[0]!r}? Known" if near else "known"
    return UserError(f"{kind} {name!r} is not known; {hint}: {', '.join(known)}; {_OUTSIDE}")

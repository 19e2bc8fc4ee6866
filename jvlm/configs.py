"""Experiments as Python files with ``get_config()``: those that come with jvlm, by name, and the user's, by path."""

from __future__ import annotations

import ast
import inspect
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jvlm.errors import UserError, file_errors

if TYPE_CHECKING:
    from jvlm.training.config import Experiment

_PACKED = Path(__file__).parent / "_configs"
# A wheel packs the repository's configs/ beside this file (setup.py); a checkout has it at the top.
FOLDER = _PACKED if _PACKED.is_dir() else Path(__file__).parents[1] / "configs"

MIXTURES = "mixtures"  # folder of what configs import, which are no experiments


def load(config: str, overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment of a config.

    Args:
      config: path of a Python file with ``get_config()``, or the name of a shipped one ("mimo_vl/easy_vqa").
      overrides: ``--field.path value ...``, as on the command line.

    Raises:
      UserError: no such config, an error in it, with its line, or no ``get_config`` that returns an `Experiment`; a
        wrong field or value.
    """
    from jvlm.options import override

    experiment = _run(find(config))
    return override(experiment, overrides, f"jvlm train {config}") if overrides else experiment


def module(name: str) -> types.ModuleType:
    """Return a shipped file as a module, for configs that build on it: "mixtures/mm1_5".

    Raises:
      UserError: no such file.
    """
    path = find(name)
    found = types.ModuleType(path.stem)
    found.__file__ = str(path)
    exec(compile(path.read_bytes(), str(path), "exec"), found.__dict__)
    return found


def _run(path: Path) -> Experiment:
    """Return what a config file's ``get_config()`` does. Raises UserError, with file and line, for errors in it."""
    from jvlm.training.config import Experiment

    with file_errors(path, "read"):
        source = path.read_bytes()
    module = types.ModuleType("jvlm_experiment")
    module.__file__ = str(path)
    try:
        sys.modules[module.__name__] = module  # where dataclasses of the file look up their annotations
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
        get_config = module.__dict__.get("get_config")
        experiment = get_config() if callable(get_config) else None
    except Exception as error:  # the file is a program of the user's
        raise UserError(_error_in_config(path, error)) from error
    if not callable(get_config):
        raise UserError(f"{path} defines no get_config()")
    if not isinstance(experiment, Experiment):
        line = get_config.__code__.co_firstlineno if inspect.isfunction(get_config) else 1
        raise UserError(f"{path}, line {line}: get_config() returned a {type(experiment).__name__}, not an Experiment")
    return experiment


def _error_in_config(path: Path, error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{path}, line {lines[-1]}: {kind}{error}" if lines else f"{path}: {kind}{error}"


def find(config: str) -> Path:
    """Return the file of a config. Raises UserError listing the shipped ones."""
    tried = [Path(config), FOLDER / config, FOLDER / f"{config}.py"]
    for path in tried:
        if path.is_file():
            return path
    raise UserError(f"no config at {', '.join(map(str, tried))}; shipped: {', '.join(shipped())}")


def shipped() -> dict[str, str]:
    """Return the names of the shipped configs, each with the first line of its docstring; no config is run."""
    files = sorted(path for path in FOLDER.glob("*/*.py") if path.parent.name != MIXTURES)
    return {str(file.relative_to(FOLDER).with_suffix("")): _summary(file) for file in files}


def _summary(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]

"""Experiments as Python files with ``get_config()``: those that come with jvlm, by name, and the user's, by path."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jvlm.errors import UserError

if TYPE_CHECKING:
    from jvlm.training.config import Experiment

_PACKED = Path(__file__).parent / "_configs"
# A wheel packs the repository's configs/ beside this file (setup.py); a checkout has it at the top.
FOLDER = _PACKED if _PACKED.is_dir() else Path(__file__).parents[1] / "configs"


def load(config: str, overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment of a config.

    Args:
      config: path of a Python file with ``get_config()``, or the name of a shipped one ("mimo_vl/easy_vqa").
      overrides: ``--field.path value ...``, as on the command line.

    Raises:
      UserError: no such config, or it has no ``get_config`` that returns an `Experiment`; a wrong field or value.
    """
    from jvlm.options import override
    from jvlm.training.config import Experiment

    path = find(config)
    spec = importlib.util.spec_from_file_location("jvlm_experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} defines no get_config()")
    experiment = module.get_config()
    if not isinstance(experiment, Experiment):
        raise UserError(f"get_config() of {path} returned a {type(experiment).__name__}, not an Experiment")
    return override(experiment, overrides, f"jvlm train {config}") if overrides else experiment


def find(config: str) -> Path:
    """Return the file of a config. Raises UserError listing the shipped ones."""
    tried = [Path(config), FOLDER / config, FOLDER / f"{config}.py"]
    for path in tried:
        if path.is_file():
            return path
    raise UserError(f"no config at {', '.join(map(str, tried))}; shipped: {', '.join(shipped())}")


def shipped() -> dict[str, str]:
    """Return the names of the shipped configs, each with the first line of its docstring; no config is run."""
    files = sorted(FOLDER.glob("*/*.py"))
    return {str(file.relative_to(FOLDER).with_suffix("")): _summary(file) for file in files}


def _summary(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]

"""An experiment as a Python file that ``jvlm train`` runs to the same effect."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jvlm.errors import UserError, file_errors
from jvlm.models.layers import Precision
from jvlm.training.config import Experiment
from jvlm.weights.hf import default_precision

_INDENT = "    "
_LINE = 120


def write(experiment: Experiment, path: Path, doc: str) -> None:
    """Write the experiment as a file with ``get_config()``.

    Args:
      doc: what the file says of itself.

    Raises:
      UserError: the file is there already, or cannot be written.
    """
    if path.suffix != ".py":
        raise UserError(f"{path}: a config is a Python file; give it a name that ends in .py")
    if path.exists():
        raise UserError(f"{path} is there already; give another name, or remove it")
    with file_errors(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source(experiment, doc))


def source(experiment: Experiment, doc: str) -> str:
    """Return the Python source of a file whose ``get_config()`` returns the experiment.

    Only what differs from the defaults is written. The architecture is that of ``init_from``. What was written on a CPU
    computes in bfloat16 on a GPU or TPU, as the command would there.
    """
    writer = _Writer()
    parts = {}
    if experiment.init_from is not None and experiment.model is not None:
        writer.use("jvlm.weights.io", "read_config")
        precision = writer.precision(experiment.model.precision)
        parts["model"] = _call("read_config", [repr(experiment.init_from), precision], 2)
        experiment = dataclasses.replace(experiment, model=None)
    body = writer.value(experiment, 1, extra=parts)
    return f'"""{doc}"""\n\n{writer.header()}\n\n\ndef get_config() -> Experiment:\n{_INDENT}return {body}\n'


def text(experiment: Experiment) -> str:
    """Return the experiment for the terminal: what differs from the defaults, as it stands in a config file."""
    return source(experiment, "").partition(f"{_INDENT}return ")[2].rstrip()


class _Writer:
    def __init__(self) -> None:
        self.imports: set[str] = set()
        self._names: dict[str, set[str]] = {}

    def use(self, module: str, name: str) -> None:
        self._names.setdefault(module, set()).add(name)

    def header(self) -> str:
        lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(self._names.items())]
        return "\n".join([*sorted(self.imports), *([""] if self.imports else []), *lines])

    def precision(self, value: Precision) -> str:
        """Return the source of a precision: what the machine that runs it computes in, unless this one has another."""
        default = default_precision()
        self.use("jvlm.weights.hf", "default_precision")
        fields = dataclasses.fields(value)
        changed = {f.name: getattr(value, f.name) for f in fields if getattr(value, f.name) != getattr(default, f.name)}
        if not changed:
            return "default_precision()"
        self.imports.add("import dataclasses")
        words = ", ".join(f"{name}={one!r}" for name, one in changed.items())
        return f"dataclasses.replace(default_precision(), {words})"

    def value(self, value: Any, depth: int, extra: dict[str, str] | None = None) -> str:
        """Return the source of a value that begins on a line of so many indents."""
        if dataclasses.is_dataclass(value):
            kind = type(value)
            self.use(kind.__module__, kind.__qualname__)
            fields = {f.name: self.value(getattr(value, f.name), depth + 1) for f in _changed(value)}
            ordered = {
                f.name: (fields | (extra or {}))[f.name]
                for f in dataclasses.fields(value)
                if f.name in {**fields, **(extra or {})}
            }
            return _call(kind.__qualname__, [f"{name}={text}" for name, text in ordered.items()], depth)
        if isinstance(value, tuple):
            items = [self.value(item, depth + 1) for item in value]
            flat = f"({', '.join(items)}{',' if len(items) == 1 else ''})"
            return flat if len(flat) < _LINE - 30 and "\n" not in flat else _lines("(", items, ")", depth)
        return repr(value)


def _changed(value: Any) -> list[dataclasses.Field]:
    def default(field: dataclasses.Field) -> Any:
        made = field.default_factory is not dataclasses.MISSING
        return field.default_factory() if made else field.default

    return [f for f in dataclasses.fields(value) if f.init and getattr(value, f.name) != default(f)]


def _call(name: str, arguments: list[str], depth: int) -> str:
    flat = f"{name}({', '.join(arguments)})"
    fits = "\n" not in flat and len(flat) + len(_INDENT) * depth < _LINE - 20 and depth > 1
    return flat if fits else _lines(f"{name}(", arguments, ")", depth)


def _lines(opening: str, items: list[str], closing: str, depth: int) -> str:
    inner = "".join(f"{_INDENT * (depth + 1)}{item},\n" for item in items)
    return f"{opening}\n{inner}{_INDENT * depth}{closing}"

"""All tasks by name: those that come with jvlm, and a user's own."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from jvlm.errors import UserError
from jvlm.evaluation.metrics import METRICS
from jvlm.evaluation.summaries import SUMMARIES
from jvlm.evaluation.task import Task
from jvlm.evaluation.tasks import SUITES, TASKS


def tasks(include: Sequence[str] = ()) -> dict[str, Task]:
    """Return the tasks by name.

    Args:
      include: Python files with a list ``TASKS`` of a user's own.

    Raises:
      UserError: a file without it; a name that is there already; a metric or summary that is not.
    """
    found = {task.name: task for task in TASKS}
    for file in include:
        for task in _read(file):
            if task.name in found:
                raise UserError(f"{file}: there is a task {task.name} already; give yours another name")
            found[task.name] = task
    for task in found.values():
        _check(task)
    return found


def _read(file: str) -> Sequence[Task]:
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--include {file}: no such file; give a Python file with a list TASKS")
    spec = importlib.util.spec_from_file_location(f"jvlm_tasks_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--include {file} is no Python file; give one with a list TASKS")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = getattr(module, "TASKS", None)
    if not isinstance(own, list | tuple) or not all(isinstance(task, Task) for task in own):
        raise UserError(f"--include {file}: it has no list TASKS of jvlm.evaluation.task.Task")
    return own


def _check(task: Task) -> None:
    for kind, name, known in (("metric", task.metric, METRICS), ("summary", task.summary, SUMMARIES)):
        if name not in known:
            raise UserError(f"task {task.name}: no {kind} {name!r}; there are {', '.join(known)}")


def choose(names: Sequence[str], known: Mapping[str, Task]) -> list[Task]:
    """Return tasks by name, or all of a group or suite by its name. Raises UserError for a name that is none."""
    chosen: dict[str, Task] = {}
    for name in (part for word in names for part in word.split(",") if part):
        group = {task.name: task for task in known.values() if task.group == name or task.name in SUITES.get(name, ())}
        if name not in known and not group:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "jvlm evaluate --list names them all"
            raise UserError(f"there is no task {name!r}; {hint}")
        chosen |= {name: known[name]} if name in known else group
    if not chosen:
        raise UserError("no tasks were given: --tasks NAME,NAME; jvlm evaluate --list names them all")
    return list(chosen.values())


def listing(known: Mapping[str, Task]) -> str:
    """Return all tasks as text: metric, version, and the files that each wants."""
    lines: list[str] = []
    for group in dict.fromkeys(task.group for task in known.values()):
        lines.append(f"{group}:")
        for task in (task for task in known.values() if task.group == group):
            judge = "; published scores are judged by a model" if task.judge else ""
            lines.append(f"  {task.name:<28} {task.metric} (version {task.version}{judge})")
            lines += [f"      {one}" for one in task.files]
            lines += [f"      note: {task.note}"] if task.note else []
    lines += ["suites:", *(f"  {name:<28} {', '.join(parts)}" for name, parts in SUITES.items())]
    return "\n".join(lines)

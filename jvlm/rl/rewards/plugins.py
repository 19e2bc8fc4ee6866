"""Reward functions written for TRL, ms-swift, verl, EasyR1 or OpenRLHF, found and called as those libraries call them.

The form is told from the code: a class is ms-swift's; functions differ in the names of their parameters.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import math
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jvlm.data.values import number
from jvlm.errors import UserError, file_errors
from jvlm.rl.rewards.source import RewardItem
from jvlm.scoring.score import Score

_NUMBERS = itertools.count()
_IMPORTING = threading.Lock()


class PluginReward:
    """A reward of somebody's own code, which runs in this process and is trusted as such.

    Args:
      name: "module:name" or "path/to/file.py:name". Without ":name" of a file: its only name in ms-swift's ``orms``, or
        ``compute_score``, or ``reward_func``.

    Raises:
      UserError: nothing of that name, or of no known form.
    """

    def __init__(self, name: str):
        self.name = name
        path, self._function = _load(name)
        self._hash = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path is not None else ""
        if inspect.isclass(self._function):
            self._function = self._guarded(self._function)
            self.form, self._ask = "ms-swift", self._swift
        else:
            self.form, self._ask = self._form(inspect.signature(self._function).parameters)

    def describe(self) -> dict[str, Any]:
        """Return what decides the rewards."""
        return {"reward": "plugin", "plugin": self.name, "form": self.form, "version": self._hash}

    def check(self, item: RewardItem) -> None:
        """Do nothing: only the plug-in knows which references it can use."""

    def close(self) -> None:
        """Do nothing."""

    def scores(self, items: Sequence[RewardItem]) -> list[Score]:
        """Return the reward of each item.

        Raises:
          UserError: the plug-in raised, gave another number of values, or one that is not from 0 to 1.
        """
        values = self._ask(items)
        if isinstance(values, str | Mapping) or not hasattr(values, "__len__") or len(values) != len(items):
            given = f"{len(values)} values" if hasattr(values, "__len__") else f"a {type(values).__name__}"
            raise UserError(f"the plug-in {self.name} was asked for {len(items)} rewards and returned {given}")
        return [self._score(item, value) for item, value in zip(items, values, strict=True)]

    def _score(self, item: RewardItem, value: Any) -> Score:
        parsed = None
        if isinstance(value, Mapping):
            parsed = {str(k): v for k, v in value.items() if isinstance(v, str | int | float | bool)}
            key = "score" if "score" in value else "overall"
            if key not in value:
                raise UserError(
                    f"the plug-in {self.name}, item {item.id}: its result has neither 'score' nor 'overall'"
                )
            value = value[key]
        if value is None:
            return Score(None, "service_error", "the plug-in gave None")
        if hasattr(value, "item"):  # of numpy or torch
            value = value.item()
        plain = float(value) if isinstance(value, bool) else number(value)
        if plain is None or not math.isfinite(plain) or not 0 <= plain <= 1:
            raise UserError(
                f"the plug-in {self.name}, item {item.id}: the reward {value!r} is not a number from 0 to 1; scale it"
            )
        return Score(float(plain), "ok", parsed)

    def _form(self, parameters: Mapping[str, inspect.Parameter]) -> tuple[str, Callable[[Sequence[RewardItem]], Any]]:
        first = next(iter(parameters), "")
        if "solution_str" in parameters:
            return "verl", self._verl
        if first in ("reward_inputs", "reward_input"):
            return "EasyR1", self._easy_r1 if first == "reward_inputs" else self._easy_r1_singly
        if first == "queries":
            return "OpenRLHF", self._openrlhf
        if "completions" in parameters:
            return "TRL", self._trl
        raise UserError(
            f"the plug-in {self.name} takes ({', '.join(parameters)}), the form of no known library; write "
            "f(prompts, completions, **columns) as for TRL, or compute_score(data_source, solution_str, ground_truth, "
            "extra_info) as for verl"
        )

    def _trl(self, items: Sequence[RewardItem]) -> Any:
        talks = all(item.messages for item in items)
        prompts: list[Any] = [list(item.messages) if talks else item.prompt for item in items]
        completions: list[Any] = [item.answer for item in items]
        if talks:
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        none = types.SimpleNamespace(global_step=0)
        logs = {"log_extra": _ignore, "log_metric": _ignore, "trainer_state": none}
        return self._with_columns(items, prompts=prompts, completions=completions, **logs)

    def _swift(self, items: Sequence[RewardItem]) -> Any:
        messages = [[*item.messages, {"role": "assistant", "content": item.answer}] for item in items]
        return self._with_columns(items, completions=[item.answer for item in items], messages=messages)

    def _with_columns(self, items: Sequence[RewardItem], **given: Any) -> Any:
        """Call with columns, each a list of what the items have; a function without ** gets those that it names."""
        names = dict.fromkeys(name for item in items for name in item.columns)
        columns = {name: [item.columns.get(name) for item in items] for name in names}
        golds = [item.gold for item in items]
        columns = {"solution": golds, "answer": golds, "ground_truth": golds} | columns
        columns["completion_ids"] = [list(item.token_ids) for item in items]
        columns["images"] = [list(item.images) for item in items]
        keywords: dict[str, Any] = columns | given
        parameters = inspect.signature(self._function).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            keywords = {name: value for name, value in keywords.items() if name in parameters}
        return self._guarded(self._function, **keywords)

    def _verl(self, items: Sequence[RewardItem]) -> Any:
        return [
            self._guarded(
                self._function,
                data_source=item.columns.get("data_source", item.task),
                solution_str=item.answer,
                ground_truth=item.gold,
                extra_info=dict(item.columns),
            )
            for item in items
        ]

    def _easy_r1(self, items: Sequence[RewardItem]) -> Any:
        return self._guarded(self._function, [_easy_r1_input(item) for item in items])

    def _easy_r1_singly(self, items: Sequence[RewardItem]) -> Any:
        return [self._guarded(self._function, _easy_r1_input(item)) for item in items]

    def _openrlhf(self, items: Sequence[RewardItem]) -> Any:
        prompts = [item.prompt for item in items]
        queries = [prompt + item.answer for prompt, item in zip(prompts, items, strict=True)]
        result = self._guarded(self._function, queries, prompts, [item.gold for item in items])
        if isinstance(result, Mapping):
            if "rewards" not in result:
                raise UserError(f"the plug-in {self.name} returned no 'rewards'")
            result = result["rewards"]
        return result.tolist() if hasattr(result, "tolist") else result

    def _guarded(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Call code of the plug-in. Raises UserError that names it for whatever it raises."""
        try:
            result = function(*arguments, **keywords)
            return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
        except Exception as error:
            raise UserError(f"the plug-in {self.name} raised {type(error).__name__}: {error}") from error


async def _awaited(result: Any) -> Any:
    return await result


def _ignore(*_: Any, **__: Any) -> None:
    """Take what a plug-in logs to a trainer that is not here."""


def _easy_r1_input(item: RewardItem) -> dict[str, Any]:
    length = len(item.token_ids) or len(item.answer.split())
    return {"response": item.answer, "response_length": length, "ground_truth": item.gold}


def _load(name: str) -> tuple[Path | None, Any]:
    """Return the file and the function or class of a name."""
    place, _, attribute = name.rpartition(":") if ":" in name else (name, "", "")
    if place.endswith(".py"):
        path = Path(place)
        with file_errors(path, "read"):
            path.read_bytes()
        with _swift_modules() as orms:
            module = _module_of_file(path, name)
            registered = dict(orms)
    else:
        if not attribute:
            raise UserError(f"the plug-in {name} names no function; write {name}:FUNCTION or a file FILE.py")
        with _swift_modules() as orms:
            try:
                module = importlib.import_module(place)
            except Exception as error:
                raise UserError(f"the plug-in {name} cannot be imported: {type(error).__name__}: {error}") from error
            registered = dict(orms)
        path = Path(module.__file__) if module.__file__ else None
    if attribute:
        found = registered.get(attribute, getattr(module, attribute, None))
    elif len(registered) == 1:
        found = next(iter(registered.values()))
    else:
        found = getattr(module, "compute_score", None) or getattr(module, "reward_func", None)
    if not callable(found):
        public = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        known = ", ".join(dict.fromkeys([*registered, *public])) or "nothing that can be called"
        raise UserError(f"the plug-in {name} has no {attribute or 'only reward'}; it has {known}")
    return path, found


def _module_of_file(path: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"_reward_plugin_{next(_NUMBERS)}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"the plug-in {name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles of it look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UserError(f"the plug-in {name} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


@contextlib.contextmanager
def _swift_modules() -> Iterator[dict[str, Any]]:
    """Offer ``swift.rewards`` and ``swift.plugin``, with ``ORM`` and ``orms``, while a plug-in is loaded."""

    class ORM:
        def __init__(self, *_: Any, **__: Any):
            pass

        def __call__(self, **keywords: Any) -> list[float]:
            raise NotImplementedError

    class AsyncORM(ORM):
        pass

    orms: dict[str, Any] = {}
    root = types.ModuleType("swift")
    root.__path__ = []
    modules = {"swift": root}
    for place in ("swift.rewards", "swift.rewards.orm", "swift.plugin", "swift.plugin.orm"):
        module = types.ModuleType(place)
        module.__path__ = []
        vars(module).update(ORM=ORM, AsyncORM=AsyncORM, orms=orms)
        modules[place] = module
        parent, _, child = place.rpartition(".")
        setattr(modules[parent], child, module)
    with _IMPORTING:
        before = {name: sys.modules.get(name) for name in modules}
        sys.modules.update(modules)
        try:
            yield orms
        finally:
            for name, module in before.items():
                if module is None:
                    sys.modules.pop(name, None)
                else:
                    sys.modules[name] = module

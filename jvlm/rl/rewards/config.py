"""Which reward judges which task, read from a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jvlm import json_files
from jvlm.errors import UserError
from jvlm.evaluation.endpoint import Endpoint
from jvlm.rl.rewards.judge import JudgeReward
from jvlm.rl.rewards.models import ModelReward
from jvlm.rl.rewards.plugins import PluginReward
from jvlm.rl.rewards.router import Route, Router
from jvlm.rl.rewards.rules import RULES, RuleReward
from jvlm.rl.rewards.source import RewardSource

_KINDS = ("rule", "plugin", "model", "judge")
_JUDGE = ("url", "model", "cache", "key_variable", "concurrency", "timeout", "canary_every")


def rules() -> Router:
    """Return a router by which each verifiable reward judges the task of its name."""
    return Router({name: Route(RuleReward(name)) for name in RULES})


def read(path: Path) -> Router:
    """Return the router of a file.

    It has, by task, one of ``{"rule": NAME, "options": {...}}``, ``{"plugin": "FILE.py:NAME"}``, ``{"model": FOLDER}``
    and ``{"judge": {"url": ..., "model": ..., "cache": FILE}}``, and ``"format_gate": true`` beside it where wanted.
    Files and folders are named from the folder of this one.

    Raises:
      UserError: naming the file, the task and the field.
    """
    routes = {}
    for task, values in json_files.read_object(path).items():
        try:
            routes[task] = _route(values, path.parent)
        except UserError as error:
            raise UserError(f"{path}, task {task!r}: {error}") from error
    return Router(routes)


def _route(values: Any, folder: Path) -> Route:
    if not isinstance(values, Mapping):
        raise UserError('write {"rule": NAME}, or another kind of reward')
    kinds = [kind for kind in _KINDS if kind in values]
    if len(kinds) != 1:
        raise UserError(f"give one of {', '.join(_KINDS)}; got {', '.join(kinds) or 'none'}")
    kind = kinds[0]
    known = {kind, "format_gate", *(("options",) if kind == "rule" else ())}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"a reward by {kind} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
    gate = values.get("format_gate", False)
    if not isinstance(gate, bool):
        raise UserError(f"format_gate is {gate!r}; write true or false")
    return Route(_source(kind, values, folder), gate)


def _source(kind: str, values: Mapping[str, Any], folder: Path) -> RewardSource:
    value = values[kind]
    if kind == "judge":
        return _judge(value, folder)
    if not isinstance(value, str):
        raise UserError(f"{kind} is {value!r}; write a text")
    if kind == "rule":
        options = values.get("options", {})
        if not isinstance(options, Mapping):
            raise UserError(f"options is {options!r}; write an object")
        return RuleReward(value, options)
    if kind == "model":
        return ModelReward.load(str(folder / value))
    file = value.rpartition(":")[0] if ":" in value else value
    return PluginReward(str(folder / value) if file.endswith(".py") else value)


def _judge(value: Any, folder: Path) -> JudgeReward:
    if not isinstance(value, Mapping) or not {"url", "model", "cache"} <= value.keys():
        raise UserError("judge needs url, model and cache")
    if unknown := sorted(value.keys() - set(_JUDGE)):
        raise UserError(f"judge has no field {unknown[0]!r}; it has {', '.join(_JUDGE)}")
    own = ("cache", "canary_every")
    endpoint = Endpoint(**{name: given for name, given in value.items() if name not in own})
    return JudgeReward(endpoint, folder / value["cache"], canary_every=value.get("canary_every", 50))

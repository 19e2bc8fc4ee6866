"""adapter_config.json of a PEFT folder (https://github.com/huggingface/peft), read strictly."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jvlm import json_files
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.peft_modules import Module, is_head
from jvlm.errors import UserError

FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# What neither says how the tensors are used nor which they are.
_WITHOUT_EFFECT = frozenset(
    "auto_mapping corda_config eva_config inference_mode init_lora_weights loftq_config lora_dropout lora_ga_config "
    "megatron_core peft_version qalora_group_size revision runtime_config task_type".split()
)
_READ = frozenset(
    "peft_type base_model_name_or_path r lora_alpha target_modules exclude_modules rank_pattern alpha_pattern "
    "use_rslora use_dora lora_bias bias modules_to_save layers_to_transform layers_pattern "
    "target_parameters trainable_token_indices".split()
)


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What of an adapter_config.json says which tensors there are and how they are used; names are PEFT's."""

    path: Path
    r: int
    lora_alpha: float
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    target_parameters: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    lora_dropout: float
    bias: str
    init_lora_weights: Any
    modules_to_save: tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    trainable_token_indices: Mapping[str, tuple[int, ...]]
    base: str | None

    def rank(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        return _first_match(self.alpha_pattern, module, self.lora_alpha)

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        return self.alpha(module) / (rank**0.5 if self.use_rslora else rank)

    def is_target(self, name: str, module: Module) -> bool:
        """Return whether a module, under its name in the file's layout, gets an adapter."""
        if _is_listed(self.exclude_modules, name) or self.is_saved(name):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == ALL_LINEAR:
                return module.kind == "linear" and not is_head(module)
            return re.fullmatch(self.target_modules, name) is not None
        if name in self.target_modules:
            return True
        return _is_listed(self.target_modules, name) and self._is_in_layers(name)

    def is_target_parameter(self, name: str) -> bool:
        """Return whether a parameter, under its name in the file's layout, gets an adapter of its own."""
        return _is_listed(self.target_parameters, name)

    def is_saved(self, name: str) -> bool:
        """Return whether a module, or one that it is a part of, is saved whole."""
        words = name.split(".")
        parents = (".".join(words[:n]) for n in range(1, len(words) + 1))
        return any(_is_listed(self.modules_to_save, parent) for parent in parents)

    def _is_in_layers(self, name: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        match = next((m for m in (re.match(pattern, name) for pattern in patterns) if m), None)
        return match is not None and int(match[1]) in self.layers_to_transform

    def adapter_config(self) -> AdapterConfig:
        """Return the settings in jvlm's form."""
        return AdapterConfig(
            rank=self.r,
            alpha=float(self.lora_alpha),
            dropout=float(self.lora_dropout),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init="gaussian" if self.init_lora_weights == "gaussian" else "default",
            targets=(*_entries(self.target_modules), *self.target_parameters),
            exclude=_entries(self.exclude_modules),
            rank_pattern=tuple(self.rank_pattern.items()),
            alpha_pattern=tuple((key, float(alpha)) for key, alpha in self.alpha_pattern.items()),
            bias=self.bias,
            lora_bias=self.lora_bias,
            train_modules=self.modules_to_save,
            train_tokens=tuple(sorted({i for ids in self.trainable_token_indices.values() for i in ids})),
        )


def read(path: Path) -> PeftConfig:
    """Return the settings of an adapter_config.json.

    Raises:
      UserError: another kind of adapter than LoRA, a feature that is not read, or a value of the wrong kind; each is
        named.
    """
    values = json_files.read_object(path)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {values.get('peft_type')!r} is not read; supported: 'LORA'")
    unread = sorted(key for key, value in values.items() if value and key not in _READ | _WITHOUT_EFFECT)
    if unread:
        raise UserError(
            f"{path}: {', '.join(f'{key} = {values[key]!r}' for key in unread)} is not read; merge the adapter in PEFT "
            "(merge_and_unload), save that model, and give its folder"
        )
    token_indices = values.get("trainable_token_indices") or {}
    if isinstance(token_indices, list):
        token_indices = {"embed_tokens": token_indices}
    try:
        config = PeftConfig(
            path=path,
            r=_number(int, values["r"]),
            lora_alpha=_number(float, values["lora_alpha"]),
            target_modules=_names(values["target_modules"]),
            exclude_modules=_names(values.get("exclude_modules")),
            target_parameters=_tuple(values.get("target_parameters")),
            rank_pattern={key: _number(int, n) for key, n in (values.get("rank_pattern") or {}).items()},
            alpha_pattern={key: _number(float, n) for key, n in (values.get("alpha_pattern") or {}).items()},
            use_rslora=bool(values.get("use_rslora")),
            use_dora=bool(values.get("use_dora")),
            lora_bias=bool(values.get("lora_bias")),
            lora_dropout=_number(float, values.get("lora_dropout") or 0.0),
            bias=values.get("bias") or "none",
            init_lora_weights=values.get("init_lora_weights", True),
            modules_to_save=tuple(values.get("modules_to_save") or ()),
            layers_to_transform=_tuple(values.get("layers_to_transform")),
            layers_pattern=_tuple(values.get("layers_pattern")),
            trainable_token_indices={key: tuple(ids) for key, ids in token_indices.items()},
            base=values.get("base_model_name_or_path") or None,
        )
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]!r}; copy the file again, or add the value") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} has a value of the wrong kind ({error}); copy the file again") from error
    _check(config)
    return config


def _check(config: PeftConfig) -> None:
    patterns = [*config.rank_pattern, *config.alpha_pattern, *config.layers_pattern]
    texts = (config.target_modules, config.exclude_modules)
    for pattern in [*patterns, *(text for text in texts if isinstance(text, str))]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{config.path}: {pattern!r} is no regular expression ({error}); correct it") from error
    ranks = {"r": config.r, **{f"rank_pattern {key!r}": rank for key, rank in config.rank_pattern.items()}}
    for field, rank in ranks.items():
        if rank < 1:
            raise UserError(f"{config.path}: {field} is {rank}, and must be at least 1")
    if config.bias not in ("none", "all", "lora_only"):
        raise UserError(f"{config.path}: bias {config.bias!r} is not one of 'none', 'all', 'lora_only'")
    if config.lora_bias and config.use_dora:
        raise UserError(f"{config.path}: lora_bias and use_dora exclude each other, in PEFT too; set one of them")


def changes_base(config: PeftConfig) -> bool:
    """Return whether the tensors belong to a base that the initialisation has changed ("pissa", "olora", ...)."""
    return config.init_lora_weights not in _PLAIN_INITS


def _first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matching, default)


def _is_listed(names: str | tuple[str, ...], name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in names)


def _entries(names: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(names, tuple):
        return names
    return (ALL_LINEAR,) if names.lower() == ALL_LINEAR else (f"re:{names}",)


def _names(value: Any) -> str | tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{value!r} is neither a list of names nor a regular expression")
    return tuple(value)


def _tuple(value: Any) -> tuple[Any, ...]:
    if value is None or value == "":
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
        raise TypeError(f"{value!r} is not a {'whole ' if kind is int else ''}number")
    return kind(value)

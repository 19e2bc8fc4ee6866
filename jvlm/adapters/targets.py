"""Which matrices a configuration asks for: by tower and role, or by Hugging Face module names as PEFT does.

A module has two Hugging Face names, the released checkpoints' and that of transformers >= 4.52; both are matched.
Parameters without a Hugging Face form are named by their paths.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from jvlm import families
from jvlm.adapters import peft_experts
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.plan import AdapterPlan, Group, scale_of
from jvlm.adapters.weights import Target
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.vlm import TOWERS, VLM, VLMConfig
from jvlm.weights import table
from jvlm.weights.vocabulary import EMBEDDING, HEAD

Kind = Literal["linear", "patch_embed", "embed", "head", "expert"]
ALL_LINEAR = "all-linear"
ROLES = (
    *("encoder", "encoder.attention", "encoder.mlp", "connector", "decoder", "decoder.attention", "decoder.mlp"),
    *("patch_embed", "embed", "head"),
)
_EXPERT = re.compile(r"\.mlp\.(gate|up|down)$")


@dataclasses.dataclass(frozen=True)
class Module:
    """A matrix that may get an adapter.

    Attributes:
      names: of its module, in each layout of a checkpoint; of an expert, also that of the parameter of all experts.
      d_in, d_out: of the matrix as jvlm stores it.
    """

    target: Target
    names: tuple[str, ...]
    kind: Kind
    d_in: int
    d_out: int

    @property
    def tower(self) -> str:
        """ "encoder", "connector" or "decoder"."""
        return self.target.path.partition(".")[0]

    @property
    def role(self) -> str:
        """The most particular of `ROLES` that it has."""
        if self.kind in ("patch_embed", "embed", "head"):
            return self.kind
        if self.tower == "connector":
            return self.tower
        return f"{self.tower}.{'attention' if '.attention.' in self.target.path else 'mlp'}"

    def has_role(self, role: str) -> bool:
        """Return whether a role, or a tower, covers it."""
        return role == self.role or (role == self.tower and self.kind in ("linear", "expert"))


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of the base, or one layer of it, with the names of its tensor."""

    target: Target
    names: tuple[str, ...]


def parameters_of(config: VLMConfig) -> list[Parameter]:
    """Return every parameter of a model, layer by layer, with the names of its tensor in each layout.

    What no checkpoint has a tensor for (experts made from a dense model, whole families) is named by its path.
    """
    shapes = vlm.parameter_shapes(config)
    form = families.get(config.family).hf
    rules = () if form is None else form.rules(config)
    named = {rule.path for rule in rules}
    result = [p for path, shape in shapes.items() if path not in named for p in _by_path(path, shape)]
    if form is None:
        return result
    sizes = {path: shape for path, shape in shapes.items() if path in named}
    for entry in table.expand(rules, form.axis_sizes(config), sizes):
        names = tuple(dict.fromkeys(rename(entry.name) for rename in form.layouts.values()))
        result.append(Parameter(Target(entry.path, () if entry.layer is None else (entry.layer,)), names))
    return result


def _by_path(path: str, shape: tuple[int, ...]) -> Iterable[Parameter]:
    if ".layer." not in path:
        return [Parameter(Target(path), (path,))]
    before, after = path.split(".layer.", 1)
    return [Parameter(Target(path, (i,)), (f"{before}.layer.{i}.{after}",)) for i in range(shape[0])]


def modules_of(config: VLMConfig) -> list[Module]:
    """Return every matrix that may get an adapter: what the family names, patch embedding, embedding table and head."""
    shapes = vlm.parameter_shapes(config)
    family = families.get(config.family)
    fused = {} if family.hf is None else {part: whole for whole, parts in family.hf.fused.items() for part in parts}
    allowed = family.adapter_targets
    result = []
    for parameter in parameters_of(config):
        path, index = parameter.target.path, parameter.target.index
        kind = _kind(path, allowed.matches(path.removesuffix(".kernel")))
        if kind is None:
            continue
        names = tuple(re.sub(r"\.(weight|kernel)$", "", name) for name in parameter.names)
        # PEFT names the parameter that has the matrices of all experts, and gate beside up (target_parameters)
        stacked = tuple(peft_experts.fused_name(name, fused) for name in names) if kind == "expert" else ()
        shape = shapes[path]
        for rest in np.ndindex(shape[len(index) : -2]):
            full = (*index, *rest)
            suffix = "".join(f".{i}" for i in rest)
            own = tuple(n + suffix for n in names)
            result.append(Module(Target(path, full), tuple(dict.fromkeys((*own, *stacked))), kind, *shape[-2:]))
    return result


def _kind(path: str, is_allowed: bool) -> Kind | None:
    if path == EMBEDDING:
        return "embed"
    if path == HEAD:
        return "head"
    if path == "encoder.patch_embed.kernel":
        return "patch_embed"
    if path.endswith(".kernel"):
        return "linear" if is_allowed else None
    return "expert" if _EXPERT.search(path) else None


def resolve(config: AdapterConfig, model: VLMConfig, token_ids: tuple[int, ...] = ()) -> AdapterPlan:
    """Return the plan of a configuration.

    Args:
      token_ids: those of ``config.train_tokens``.

    Raises:
      UserError: nothing is picked, naming the nearest module names; a module that cannot have such an adapter; whole
        modules of a part of a stack.
    """
    modules = modules_of(model)
    whole = _whole(config, model, modules)
    excluded = {m.target for entry in config.exclude for m in modules if _picks(entry, m)}
    picked = [
        m
        for m in modules
        if m.target.path not in whole and m.target not in excluded and any(_picks(entry, m) for entry in config.targets)
    ]
    if not picked and (config.targets or not (whole or token_ids)):
        raise UserError(
            f"adapter.targets {', '.join(config.targets)} pick no module; {_nearest(config.targets, modules)}"
        )
    _check(config, model, picked, token_ids)
    groups: dict[str, dict[tuple[int, ...], tuple[int, float]]] = {}
    for module in picked:
        rank = _first(config.rank_pattern, module.names, config.rank)
        alpha = float(_first(config.alpha_pattern, module.names, config.alpha))
        groups.setdefault(module.target.path, {})[module.target.index] = rank, alpha
    shapes = vlm.parameter_shapes(model)
    plan = AdapterPlan(
        config,
        tuple(_group(config, path, shapes[path][:-2], chosen) for path, chosen in sorted(groups.items())),
        tuple(sorted(whole)),
        token_ids,
    )
    return dataclasses.replace(plan, parameters=tuple(sorted({*whole, *_biases(config, model, groups, shapes)})))


def _group(
    config: AdapterConfig, path: str, lead: tuple[int, ...], chosen: Mapping[tuple[int, ...], tuple[int, float]]
) -> Group:
    ones = [chosen.get(index, (0, 0.0)) for index in np.ndindex(lead)]
    scales = tuple(scale_of(config, rank, alpha) if rank else 0.0 for rank, alpha in ones)
    return Group(
        path,
        lead,
        tuple(rank for rank, _ in ones),
        tuple(alpha for _, alpha in ones),
        scales,
        magnitude=config.use_dora,
        bias=config.lora_bias,
    )


def _picks(entry: str, module: Module) -> bool:
    """Return whether an entry of ``targets`` or ``exclude`` picks a module."""
    if entry in ROLES:
        return module.has_role(entry)
    if entry == ALL_LINEAR:
        return module.kind == "linear"
    if entry.startswith("re:"):
        return any(re.fullmatch(entry[3:], name) for name in module.names)
    return any(name == entry or name.endswith(f".{entry}") for name in module.names)


def _first(patterns: Iterable[tuple[str, float]], names: tuple[str, ...], default: float) -> float:
    """Return the value of the first pattern that matches, as PEFT matches them."""
    for key, value in patterns:
        if any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            return value
    return default


def _whole(config: AdapterConfig, model: VLMConfig, modules: list[Module]) -> set[str]:
    """Return the paths of the parameters of ``train_modules``."""
    parameters, paths = parameters_of(model), set()
    for entry in config.train_modules:
        inside = [p for p in parameters if _inside(entry, p)]
        if not inside:
            names = {name.rpartition(".")[0] for p in parameters for name in p.names}
            near = difflib.get_close_matches(entry, [*ROLES, *names], n=3, cutoff=0.3)
            raise UserError(f"adapter.train_modules: {entry!r} names no module; there are {', '.join(near)}")
        paths |= _all_layers(inside, parameters, f"adapter.train_modules: {entry!r}")
    return paths


def _inside(entry: str, parameter: Parameter) -> bool:
    """Return whether a parameter is in the module (or tower, or role) that an entry names."""
    path = parameter.target.path
    if entry in TOWERS:
        return path.startswith(f"{entry}.")
    if entry in ROLES:
        return {"embed": EMBEDDING, "head": HEAD}.get(entry) == path or (
            entry == "patch_embed" and path.startswith("encoder.patch_embed.")
        )
    for name in parameter.names:
        parts = name.split(".")
        if any(".".join(parts[:n]) == entry or ".".join(parts[:n]).endswith(f".{entry}") for n in range(1, len(parts))):
            return True
    return False


def _all_layers(chosen: list[Parameter], parameters: list[Parameter], what: str) -> set[str]:
    """Return the paths of parameters. Raises UserError where only some layers of a stack are among them."""
    for path in {p.target.path for p in chosen}:
        some, every = ([p for p in part if p.target.path == path] for part in (chosen, parameters))
        if len(some) != len(every):
            raise UserError(
                f"{what} is {len(some)} of the {len(every)} layers of {path}, which are stored and trained together: "
                "name all of them, or give these layers an adapter of full rank instead"
            )
    return {p.target.path for p in chosen}


def _biases(config: AdapterConfig, model: VLMConfig, groups: Mapping, shapes: Mapping) -> set[str]:
    if config.bias == "none":
        return set()
    if config.bias == "all":
        return {path for path in shapes if path.endswith(".bias")}
    adapted = {path: re.sub(r"\.kernel$", ".bias", path) for path in groups}
    for path, bias in adapted.items():
        if bias in shapes and len(groups[path]) != int(np.prod(shapes[path][:-2])):
            raise UserError(
                f"adapter.bias 'lora_only': {len(groups[path])} of {shapes[path][0]} layers of {path} have an adapter, "
                "and the biases of a stack are trained together: take all layers, or bias 'none' or 'all'"
            )
    return {bias for bias in adapted.values() if bias in shapes}


def _check(config: AdapterConfig, model: VLMConfig, picked: list[Module], token_ids: tuple[int, ...]) -> None:
    kinds = {module.kind for module in picked}
    if getattr(model.decoder, "tie_word_embeddings", False) and any(
        entry in ("head", "lm_head") for entry in (*config.targets, *config.train_modules)
    ):
        raise UserError(
            "adapter: the head of this model is its embedding table (tie_word_embeddings), so it has no matrix of its "
            "own; target embed, or untie the model first (jvlm.adapters.merge.untie)"
        )
    if token_ids and kinds & {"embed", "head"}:
        raise UserError("adapter.train_tokens and an adapter on embed or head replace the same rows: choose one")
    if "expert" in kinds and (config.use_dora or config.dropout or config.lora_bias):
        raise UserError(
            "adapter: experts take plain LoRA, without use_dora, dropout (--lora_dropout 0) and lora_bias, as in PEFT; "
            "leave these out, or exclude the experts"
        )
    if config.init in ("pissa", "olora") and kinds & {"embed", "head", "expert"}:
        raise UserError(f"adapter.init {config.init!r} is for linear maps; exclude embed, head and experts")
    if config.use_dora and config.lora_bias:
        raise UserError("adapter.lora_bias and use_dora do not go together (as in PEFT)")
    if config.lora_bias and "embed" in kinds:
        raise UserError("adapter.lora_bias: an embedding table has no bias; exclude embed")


def _nearest(entries: Iterable[str], modules: list[Module]) -> str:
    names = {name for module in modules for name in module.names}
    suffixes = {name.rpartition(".")[2] for name in names}
    known = sorted({*ROLES, ALL_LINEAR, *names, *suffixes})
    near = [n for entry in entries for n in difflib.get_close_matches(entry.removeprefix("re:"), known, 3, 0.3)]
    return f"nearest: {', '.join(dict.fromkeys(near)) or ', '.join(sorted(suffixes))}"


def unmatched(config: AdapterConfig, model: VLMConfig) -> list[str]:
    """Return a line for each entry of ``targets`` that picks nothing, as PEFT passes over them in silence."""
    modules = modules_of(model)
    lost = [entry for entry in config.targets if not any(_picks(entry, module) for module in modules)]
    return [f"adapter.targets: {entry!r} picks nothing; {_nearest([entry], modules)}" for entry in lost]


def report(model: VLM) -> list[str]:
    """Return what a run prints of its adapters: the table of `describe`, and entries that pick nothing."""
    return [describe(model.adapters, model), *unmatched(model.adapters.config, model.config)]


def describe(plan: AdapterPlan, model: VLM) -> str:
    """Return the table of what has adapters: tower, role, modules, ranks and parameters; and what is trained whole."""
    kinds = {module.target.path: module for module in modules_of(model.config)}
    rows: dict[tuple[str, str], list[int]] = {}
    ranks: dict[tuple[str, str], set[int]] = {}
    for group in plan.groups:
        module = kinds[group.path]
        key = module.tower, module.role
        counts = rows.setdefault(key, [0, 0])
        for _, i in group.indices:
            rank = group.ranks[i]
            ranks.setdefault(key, set()).add(rank)
            counts[0] += 1
            counts[1] += rank * (module.d_in + module.d_out) + (group.magnitude + group.bias) * module.d_out
    lines = [f"{'adapters':<12}{'role':<20}{'modules':>10}{'rank':>10}{'parameters':>16}"]
    for tower, role in sorted(rows, key=lambda key: (TOWERS.index(key[0]), key[1])):
        modules, parameters = rows[tower, role]
        rank = ", ".join(map(str, sorted(ranks[tower, role])))
        lines.append(f"{tower:<12}{role:<20}{modules:>10,}{rank:>10}{parameters:>16,}")
    total = [sum(column) for column in zip(*rows.values(), strict=True)] or [0, 0]
    lines.append(f"{'all':<12}{'':<20}{total[0]:>10,}{'':>10}{total[1]:>16,}")
    base = vlm.parameters(model)
    for path in plan.parameters:
        lines.append(f"whole       {path:<44}{base[path].get_value().size:>12,}")
    if plan.token_ids:
        lines.append(f"rows of {len(plan.token_ids)} tokens: {', '.join(map(str, plan.token_ids))}")
    return "\n".join(lines)

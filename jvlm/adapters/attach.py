"""Putting adapters on a model, taking their numbers out, and taking them off."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jvlm.adapters import initial, plan, targets
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.layers import AdapterConstant, AdapterParam, LowRankAdapter, TokenRows
from jvlm.adapters.plan import AdapterPlan, Group
from jvlm.adapters.weights import AdapterWeights, LowRank, Target
from jvlm.adapters.weights import TokenRows as TokenRowsArrays
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.layers import StoredKernel
from jvlm.models.vlm import VLM

ShardingOf = Callable[[str, nnx.Variable], jax.sharding.Sharding]
EMBEDDING, HEAD = targets.EMBEDDING, targets.HEAD


def attach(
    model: VLM,
    adapter: AdapterConfig | AdapterWeights,
    *,
    seed: int = 0,
    tokenizer: Any = None,
    sharding: ShardingOf | None = None,
) -> VLM:
    """Return the model with adapters; it shares the arrays of the base, which stay as they are.

    Args:
      adapter: a configuration, for new matrices that change no answer yet; or weights.
      seed: of new matrices, which depend on nothing else but the path, whatever the mesh.
      tokenizer: to find ``train_tokens`` that are given as text.
      sharding: of a variable, from its path and itself; None puts all on the first device.

    Raises:
      UserError: see `jvlm.adapters.targets.resolve`; weights that do not fit the model; a model that has adapters.
    """
    if model.adapters is not None:
        raise UserError("the model has adapters already: merge or detach them first, or start from adapters_from")
    if isinstance(adapter, AdapterWeights):
        shapes = {path: matrix.shape for path, matrix in matrices(model).items()}
        _check_fit(adapter, shapes)
        adapter_plan = plan.of_weights(adapter, {path: shape[:-2] for path, shape in shapes.items()})
        return _filled(structure(model, adapter_plan), _values_of(adapter, adapter_plan, model), sharding)
    adapter_plan = targets.resolve(adapter, model.config, token_ids(adapter, tokenizer))
    return _filled(structure(model, adapter_plan), _new_values(model, adapter_plan, seed), sharding)


def token_ids(config: AdapterConfig, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of ``config.train_tokens``, ascending. Raises UserError for a text that is no single token."""
    ids = set()
    for token in config.train_tokens:
        if isinstance(token, int):
            ids.add(token)
            continue
        if tokenizer is None:
            raise UserError(f"adapter.train_tokens: {token!r} needs the tokenizer; give the id")
        token_id = tokenizer.get_vocab().get(token)
        if token_id is None:
            raise UserError(f"adapter.train_tokens: {token!r} is no token of the tokenizer; add it, or give an id")
        ids.add(token_id)
    return tuple(sorted(ids))


def owner_of(model: VLM, path: str) -> tuple[nnx.Module, str]:
    """Return the module that has a parameter, and the attribute of that module in which its adapter stands."""
    *parents, name = path.split(".")
    module: Any = model
    for part in parents:
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    if name in ("kernel", "embedding"):
        return module, "adapter"
    return getattr(module, f"{name}_slot"), "adapter"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A parameter of the base, or a quantised kernel.

    Attributes:
      read: gives the matrix at an index of the leading axes, on the host; None where there are only shapes.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    read: Callable[[tuple[int, ...]], np.ndarray] | None


def matrices(model: VLM) -> dict[str, Matrix]:
    """Return path -> matrix, for all parameters of the base; quantised kernels under the paths of plain ones."""
    result = {}
    for path, variable in vlm.parameters(model).items():
        value, axes = variable.get_value(), tuple(variable.get_metadata()["axes"])
        is_shape = isinstance(value, jax.ShapeDtypeStruct)
        result[path] = Matrix(
            tuple(value.shape), axes, None if is_shape else lambda index, value=value: np.asarray(value[index])
        )
    for parts, module in nnx.iter_modules(model):
        if isinstance(module, StoredKernel):
            path, shape = ".".join(map(str, parts)), tuple(module.stacked_shape)
            for name in [name for name in result if name.startswith(f"{path}.")]:
                del result[name]
            is_shape = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(module)))
            result[path] = Matrix(shape, module.axes, None if is_shape else functools.partial(_dequantised, module))
    return result


def _dequantised(kernel: StoredKernel, index: tuple[int, ...]) -> np.ndarray:
    graph, state = nnx.split(kernel)
    one = nnx.merge(graph, jax.tree.map(lambda value: value[index], state))
    return np.asarray(one.weight(jnp.float32))


def adapter_of(model: VLM, path: str) -> LowRankAdapter:
    """Return the adapter that stands beside a parameter."""
    return getattr(*owner_of(model, path))


def adapter_path(path: str) -> str:
    """Return the path of the adapter of a parameter."""
    before, _, name = path.rpartition(".")
    return f"{before}.adapter" if name in ("kernel", "embedding") else f"{before}.{name}_slot.adapter"


def structure(model: VLM, adapter_plan: AdapterPlan) -> VLM:
    """Return the model with the adapters of a plan as shapes without arrays."""
    model = nnx.merge(*nnx.split(model))
    variables = matrices(model)
    for group in adapter_plan.groups:
        module, name = owner_of(model, group.path)
        setattr(module, name, nnx.data(_abstract(group, adapter_plan.config, variables[group.path])))
    if adapter_plan.token_ids:
        decoder, n = model.decoder, len(adapter_plan.token_ids)
        ids, dtype = jax.ShapeDtypeStruct((n,), jnp.int32), jnp.float32
        width = variables[EMBEDDING].shape[1]
        for name in ("token_rows", "head_rows") if HEAD in variables else ("token_rows",):
            rows = AdapterParam(jax.ShapeDtypeStruct((n, width), dtype), axes=("position", "embed"))
            setattr(decoder, name, nnx.data(TokenRows(AdapterConstant(ids, axes=("position",)), rows)))
    model.adapters = adapter_plan
    return model


def _abstract(group: Group, config: AdapterConfig, base: Matrix) -> LowRankAdapter:
    *lead, d_in, d_out = base.shape
    *first, i, o = base.axes
    rank = group.rank

    def variable(kind: type, shape: Sequence[int], names: Sequence[str]) -> Any:
        return kind(jax.ShapeDtypeStruct((*lead, *shape), jnp.float32), axes=(*first, *names))

    start = None
    if config.init in ("pissa", "olora"):
        start = (
            variable(AdapterConstant, (d_in, rank), (i, "rank")),
            variable(AdapterConstant, (rank, d_out), ("rank", o)),
        )
    return LowRankAdapter(
        variable(AdapterParam, (d_in, rank), (i, "rank")),
        variable(AdapterParam, (rank, d_out), ("rank", o)),
        variable(AdapterConstant, (), ()),
        axes=(i, o),
        magnitude=variable(AdapterParam, (d_out,), (o,)) if group.magnitude else None,
        bias=variable(AdapterParam, (d_out,), (o,)) if group.bias else None,
        start=start,
        dropout=config.dropout,
    )


def _filled(model: VLM, values: Mapping[str, Any], sharding: ShardingOf | None) -> VLM:
    """Return the model of a `structure` with host arrays in the place of shapes; of the base, those given."""
    bound = {path: variable.get_value() for path, variable in vlm.parameters(model).items()}
    is_abstract = any(isinstance(value, jax.ShapeDtypeStruct) for value in bound.values())
    for path, variable in vlm.variables(model).items():
        if path in values and not is_abstract:
            value = values[path]() if callable(values[path]) else values[path]
            target = sharding(path, variable) if sharding else jax.sharding.SingleDeviceSharding(jax.devices()[0])
            bound[path] = jax.device_put(np.asarray(value, variable.get_value().dtype), target)
        elif path not in bound:
            bound[path] = variable.get_value()
    return vlm.bind(model, bound)


def _new_values(model: VLM, adapter_plan: AdapterPlan, seed: int) -> dict[str, Any]:
    """Return path -> function that gives the host array, for all variables of new adapters."""
    variables, values = matrices(model), {}
    for group in adapter_plan.groups:
        rng = np.random.default_rng([seed, zlib.crc32(group.path.encode())])
        base = variables[group.path]
        if base.read is None:
            continue
        prefix = adapter_path(group.path)
        is_table = group.path == EMBEDDING
        a, b = initial.pairs(adapter_plan.config.init, group, base.shape[-2:], base.read, rng, is_table=is_table)
        values[f"{prefix}.a"], values[f"{prefix}.b"] = a, b
        values[f"{prefix}.scale"] = np.asarray(group.scales, np.float32).reshape(group.lead)
        if adapter_plan.config.init in ("pissa", "olora"):
            values[f"{prefix}.start_a"], values[f"{prefix}.start_b"] = a, b
        if group.magnitude:
            values[f"{prefix}.magnitude"] = initial.norms(base.shape, base.read)
        if group.bias:
            values[f"{prefix}.bias"] = np.zeros((*group.lead, base.shape[-1]), np.float32)
    ids = np.asarray(adapter_plan.token_ids, np.int32)
    for name, path in (("token_rows", EMBEDDING), ("head_rows", HEAD)) if adapter_plan.token_ids else ():
        if path not in variables:
            continue
        table = variables[path]
        size = table.shape[0] if path == EMBEDDING else table.shape[1]
        if ids.max() >= size:
            raise UserError(f"adapter.train_tokens: token {ids.max()} is outside the table of {size} rows")
        if table.read is not None:
            rows = table.read((ids,)) if path == EMBEDDING else table.read((slice(None), ids)).T
            values[f"decoder.{name}.ids"], values[f"decoder.{name}.rows"] = ids, np.asarray(rows, np.float32)
    return values


def _check_fit(weights: AdapterWeights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError listing everything that does not fit the model's parameters."""
    lines = []
    for target, one in weights.low_rank.items():
        shape = shapes.get(target.path)
        if shape is None:
            lines.append(f"{target.path}: the model has no such parameter")
        elif len(target.index) != len(shape) - 2 or any(i >= n for i, n in zip(target.index, shape[:-2], strict=True)):
            lines.append(f"{target.path}{list(target.index)}: the parameter has shape {shape}")
        elif (one.a.shape[0], one.b.shape[1]) != shape[-2:]:
            lines.append(
                f"{target.path}{list(target.index)}: adapter of {one.a.shape[0]} x {one.b.shape[1]}, matrix of "
                f"{shape[-2]} x {shape[-1]}"
            )
    by_path: dict[str, list[LowRank]] = {}
    for target, one in weights.low_rank.items():
        by_path.setdefault(target.path, []).append(one)
    for path, ones in by_path.items():
        for name in ("magnitude", "bias"):
            if len({getattr(one, name) is None for one in ones}) > 1:
                lines.append(f"{path}: some layers have a {name} and others have none")
    for target, value in weights.parameters.items():
        shape = shapes.get(target.path)
        if shape is None or tuple(np.shape(value)) != shape[len(target.index) :]:
            lines.append(
                f"{target.path}{list(target.index)}: whole parameter of {np.shape(value)}, the model's: {shape}"
            )
    if lines:
        raise UserError(f"the adapter does not fit the model ({len(lines)} problems):\n  " + "\n  ".join(lines))


def _values_of(weights: AdapterWeights, adapter_plan: AdapterPlan, model: VLM) -> dict[str, Any]:
    variables, values = matrices(model), {}
    for group in adapter_plan.groups:
        prefix, shape = adapter_path(group.path), variables[group.path].shape
        parts = {"a": (shape[-2], group.rank), "b": (group.rank, shape[-1])}
        parts |= {name: (shape[-1],) for name in ("magnitude", "bias") if getattr(group, name)}
        arrays = {name: np.zeros((*group.lead, *size), np.float32) for name, size in parts.items()}
        for index, i in group.indices:
            one, rank = weights.low_rank[Target(group.path, index)], group.ranks[i]
            arrays["a"][index][:, :rank] = one.a
            arrays["b"][index][:rank] = one.b
            for name in parts.keys() - {"a", "b"}:
                arrays[name][index] = getattr(one, name)
        arrays["scale"] = np.asarray(group.scales, np.float32).reshape(group.lead)
        values |= {f"{prefix}.{name}": array for name, array in arrays.items()}
    by_path: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for target, value in weights.parameters.items():
        by_path.setdefault(target.path, {})[target.index] = value
    for path, layers in by_path.items():
        base = variables[path]
        if base.read is not None:
            whole = np.array(base.read(()))
            for index, value in layers.items():
                whole[index] = value
            values[path] = whole
    for path, rows in weights.token_rows.items():
        name = "token_rows" if path == EMBEDDING else "head_rows"
        values[f"decoder.{name}.ids"] = np.asarray(rows.token_ids, np.int32)
        values[f"decoder.{name}.rows"] = np.asarray(rows.rows, np.float32)
    return values


def extract(model: VLM) -> AdapterWeights:
    """Return the numbers of a model's adapters, on the host.

    What began as a part of the base (PiSSA, OLoRA) comes as plain LoRA of twice the rank, which says the same beside
    the base as it was.

    Raises:
      UserError: a model without adapters.
    """
    adapter_plan = _plan(model)
    values = {path: v.get_value() for path, v in vlm.variables(model).items()}
    doubled = adapter_plan.config.init in ("pissa", "olora")
    low_rank = {}
    for group in adapter_plan.groups:
        prefix = adapter_path(group.path)
        arrays = {
            name: np.asarray(values[f"{prefix}.{name}"])
            for name in ("a", "b", "magnitude", "bias", "start_a", "start_b")
            if f"{prefix}.{name}" in values
        }
        for index, i in group.indices:
            rank, alpha = group.ranks[i], group.alphas[i]
            a, b = arrays["a"][index][:, :rank], arrays["b"][index][:rank]
            if doubled:
                a = np.concatenate([a, arrays["start_a"][index][:, :rank]], 1)
                b = np.concatenate([b, -arrays["start_b"][index][:rank]], 0)
                alpha = alpha * _doubled_alpha(adapter_plan.config)
            rest = {name: arrays[name][index] if name in arrays else None for name in ("magnitude", "bias")}
            low_rank[Target(group.path, index)] = LowRank(a, b, group.scales[i], alpha, **rest)
    parameters = {
        Target(path, index): np.asarray(values[path])[index]
        for path in adapter_plan.parameters
        for index in ([(i,) for i in range(values[path].shape[0])] if ".layer." in path else [()])
    }
    names = {"token_rows": EMBEDDING, "head_rows": HEAD}
    rows = {
        path: TokenRowsArrays(np.asarray(adapter_plan.token_ids), np.asarray(values[f"decoder.{name}.rows"]))
        for name, path in names.items()
        if f"decoder.{name}.rows" in values
    }
    return AdapterWeights(_plain(adapter_plan.config) if doubled else adapter_plan.config, low_rank, parameters, rows)


def _doubled_alpha(config: AdapterConfig) -> float:
    return 2**0.5 if config.use_rslora else 2.0


def _plain(config: AdapterConfig) -> AdapterConfig:
    """Return the configuration of an adapter that began as a part of the base, as plain LoRA of twice the rank."""
    return dataclasses.replace(
        config,
        init="default",
        rank=2 * config.rank,
        alpha=_doubled_alpha(config) * config.alpha,
        rank_pattern=tuple((key, 2 * rank) for key, rank in config.rank_pattern),
        alpha_pattern=tuple((key, _doubled_alpha(config) * alpha) for key, alpha in config.alpha_pattern),
    )


def detach(model: VLM) -> VLM:
    """Return the base of a model with adapters, its arrays shared.

    Raises:
      UserError: a model without adapters, or one of which whole parameters were trained: their former values are not
        known, so load the base instead.
    """
    adapter_plan = _plan(model)
    if adapter_plan.parameters:
        raise UserError(
            f"{len(adapter_plan.parameters)} parameters were trained whole beside the adapters "
            f"({adapter_plan.parameters[0]}, ...): "
            "their former values are in the base's folder, load that"
        )
    model = nnx.merge(*nnx.split(model))
    for group in adapter_plan.groups:
        setattr(*owner_of(model, group.path), nnx.static(None))
    model.decoder.token_rows = nnx.static(None)
    model.decoder.head_rows = nnx.static(None)
    model.adapters = None
    return model


def _plan(model: VLM) -> AdapterPlan:
    if model.adapters is None:
        raise UserError("the model has no adapters")
    return model.adapters

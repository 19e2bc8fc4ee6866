"""Putting adapters on a model, taking their numbers out, and taking them off."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jvlm.adapters import initial, neutral, targets
from jvlm.adapters import plan as plans
from jvlm.adapters.base_matrices import Matrix, adapter_path, matrices, module_of
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.layers import RANK, AdapterConstant, AdapterParam, LowRankAdapter, TokenRows
from jvlm.adapters.plan import AdapterPlan, Group
from jvlm.adapters.weights import AdapterWeights, LowRank, Target
from jvlm.adapters.weights import TokenRows as TokenRowsArrays
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.weights.hf import ShardingOf
from jvlm.weights.vocabulary import EMBEDDING, HEAD

# Attributes of the decoder with trained rows of a table, and the table.
_TABLES = {"token_rows": EMBEDDING, "head_rows": HEAD}


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
        plan = plans.of_weights(adapter, {path: shape[:-2] for path, shape in shapes.items()})
        return _filled(structure(model, plan), _values_of(adapter, plan, model), sharding)
    plan = targets.resolve(adapter, model.config, token_ids(adapter, tokenizer))
    return _filled(structure(model, plan), _new_values(model, plan, seed), sharding)


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


def structure(model: VLM, plan: AdapterPlan) -> VLM:
    """Return the model with the adapters of a plan as shapes without arrays."""
    model = nnx.merge(*nnx.split(model))
    variables = matrices(model)
    for group in plan.groups:
        module_of(model, group.path).adapter = nnx.data(_abstract(group, plan.config, variables[group.path]))
    if plan.token_ids:
        n, width = len(plan.token_ids), variables[EMBEDDING].shape[1]
        for name, path in _TABLES.items():
            if path in variables:
                ids = AdapterConstant(jax.ShapeDtypeStruct((n,), jnp.int32), axes=("position",))
                rows = AdapterParam(jax.ShapeDtypeStruct((n, width), jnp.float32), axes=("position", "embed"))
                setattr(model.decoder, name, nnx.data(TokenRows(ids, rows)))
    model.adapters = plan
    return model


def _abstract(group: Group, config: AdapterConfig, base: Matrix) -> LowRankAdapter:
    *lead, d_in, d_out = base.shape
    *first, i, o = base.axes
    rank = group.rank

    def variable(kind: type, shape: Sequence[int], names: Sequence[str]) -> Any:
        return kind(jax.ShapeDtypeStruct((*lead, *shape), jnp.float32), axes=(*first, *names))

    start = None
    if config.init in neutral.INITS:
        start = (
            variable(AdapterConstant, (d_in, rank), (i, RANK)),
            variable(AdapterConstant, (rank, d_out), (RANK, o)),
        )
    return LowRankAdapter(
        variable(AdapterParam, (d_in, rank), (i, RANK)),
        variable(AdapterParam, (rank, d_out), (RANK, o)),
        variable(AdapterConstant, (), ()),
        axes=(i, o),
        magnitude=variable(AdapterParam, (d_out,), (o,)) if group.magnitude else None,
        bias=variable(AdapterParam, (d_out,), (o,)) if group.bias else None,
        start=start,
        dropout=config.dropout,
    )


def _filled(model: VLM, values: Mapping[str, np.ndarray], sharding: ShardingOf | None) -> VLM:
    """Return the model of a `structure` with host arrays in the place of shapes; of the base, those given."""
    bound = {path: variable.get_value() for path, variable in vlm.parameters(model).items()}
    is_abstract = any(isinstance(value, jax.ShapeDtypeStruct) for value in bound.values())
    for path, variable in vlm.variables(model).items():
        if path in values and not is_abstract:
            target = sharding(path, variable) if sharding else jax.sharding.SingleDeviceSharding(jax.devices()[0])
            bound[path] = jax.device_put(np.asarray(values[path], variable.get_value().dtype), target)
        elif path not in bound:
            bound[path] = variable.get_value()
    return vlm.bind(model, bound)


def _new_values(model: VLM, plan: AdapterPlan, seed: int) -> dict[str, np.ndarray]:
    """Return the values of all variables of new adapters by path; none for a model of shapes."""
    variables, values = matrices(model), {}
    for group in plan.groups:
        rng = np.random.default_rng([seed, zlib.crc32(group.path.encode())])
        base, prefix = variables[group.path], adapter_path(group.path)
        if base.read is None:
            continue
        is_table = group.path == EMBEDDING
        a, b = initial.pairs(plan.config.init, group, base.shape[-2:], base.read, rng, is_table=is_table)
        values[f"{prefix}.a"], values[f"{prefix}.b"] = a, b
        values[f"{prefix}.scale"] = np.asarray(group.scales, np.float32).reshape(group.lead)
        if plan.config.init in neutral.INITS:
            values[f"{prefix}.start_a"], values[f"{prefix}.start_b"] = a, b
        if group.magnitude:
            values[f"{prefix}.magnitude"] = initial.norms(base.shape, base.read)
        if group.bias:
            values[f"{prefix}.bias"] = np.zeros((*group.lead, base.shape[-1]), np.float32)
    return values | _new_rows(variables, np.asarray(plan.token_ids, np.int32))


def _new_rows(variables: Mapping[str, Matrix], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of tokens that are trained, which begin as the base's."""
    values = {}
    for name, path in _TABLES.items():
        if not len(ids) or path not in variables:
            continue
        table, axis = variables[path], 0 if path == EMBEDDING else 1
        if ids.max() >= table.shape[axis]:
            raise UserError(f"adapter.train_tokens: token {ids.max()} is outside the table of {table.shape[axis]} rows")
        if table.read is not None:
            rows = table.read((ids,)) if axis == 0 else table.read((slice(None), ids)).T
            values[f"decoder.{name}.ids"], values[f"decoder.{name}.rows"] = ids, np.asarray(rows, np.float32)
    return values


def _check_fit(weights: AdapterWeights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError listing everything that does not fit the model's parameters."""
    problems = []
    by_path: dict[str, list[LowRank]] = {}
    for target, low in weights.low_rank.items():
        by_path.setdefault(target.path, []).append(low)
        shape, name = shapes.get(target.path), f"{target.path}{list(target.index)}"
        if shape is None:
            problems.append(f"{target.path}: the model has no such parameter")
        elif len(target.index) != len(shape) - 2 or any(i >= n for i, n in zip(target.index, shape[:-2], strict=True)):
            problems.append(f"{name}: the parameter has shape {shape}")
        elif (low.a.shape[0], low.b.shape[1]) != shape[-2:]:
            sizes = f"adapter of {low.a.shape[0]} x {low.b.shape[1]}, matrix of {shape[-2]} x {shape[-1]}"
            problems.append(f"{name}: {sizes}")
    for path, lows in by_path.items():
        for name in ("magnitude", "bias"):
            if len({getattr(low, name) is None for low in lows}) > 1:
                problems.append(f"{path}: some layers have a {name} and others have none")
    for target, value in weights.parameters.items():
        shape = shapes.get(target.path)
        if shape is None or tuple(np.shape(value)) != shape[len(target.index) :]:
            name = f"{target.path}{list(target.index)}"
            problems.append(f"{name}: whole parameter of {np.shape(value)}, the model's: {shape}")
    if problems:
        raise UserError(f"the adapter does not fit the model ({len(problems)} problems):\n  " + "\n  ".join(problems))


def _values_of(weights: AdapterWeights, plan: AdapterPlan, model: VLM) -> dict[str, np.ndarray]:
    """Return given weights as the values of variables by path, layers stacked; whole parameters among them."""
    variables, values = matrices(model), {}
    for group in plan.groups:
        prefix, shape = adapter_path(group.path), variables[group.path].shape
        parts = {"a": (shape[-2], group.rank), "b": (group.rank, shape[-1])}
        parts |= {name: (shape[-1],) for name in ("magnitude", "bias") if getattr(group, name)}
        arrays = {name: np.zeros((*group.lead, *size), np.float32) for name, size in parts.items()}
        for index, i in group.indices:
            low, rank = weights.low_rank[Target(group.path, index)], group.ranks[i]
            arrays["a"][index][:, :rank] = low.a
            arrays["b"][index][:rank] = low.b
            for name in parts.keys() - {"a", "b"}:
                arrays[name][index] = getattr(low, name)
        arrays["scale"] = np.asarray(group.scales, np.float32).reshape(group.lead)
        values |= {f"{prefix}.{name}": array for name, array in arrays.items()}
    for target, value in weights.parameters.items():
        base = variables[target.path]
        if base.read is not None:
            whole = values.setdefault(target.path, np.array(base.read(())))
            whole[target.index] = value
    for name, path in _TABLES.items():
        if path in weights.token_rows:
            rows = weights.token_rows[path]
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
    plan = _plan(model)
    values = {path: v.get_value() for path, v in vlm.variables(model).items()}
    began_in_base = plan.config.init in neutral.INITS
    low_rank = {}
    for group in plan.groups:
        prefix = adapter_path(group.path)
        names = ("a", "b", "magnitude", "bias", "start_a", "start_b")
        arrays = {name: np.asarray(values[f"{prefix}.{name}"]) for name in names if f"{prefix}.{name}" in values}
        for index, i in group.indices:
            rank = group.ranks[i]
            a, b = arrays["a"][index][:, :rank], arrays["b"][index][:rank]
            vectors = {name: arrays[name][index] if name in arrays else None for name in ("magnitude", "bias")}
            low = LowRank(a, b, group.scales[i], group.alphas[i], **vectors)
            if began_in_base:
                start = arrays["start_a"][index][:, :rank], arrays["start_b"][index][:rank]
                low = neutral.less_start(low, *start, plan.config)
            low_rank[Target(group.path, index)] = low
    parameters = {
        Target(path, index): np.asarray(values[path])[index]
        for path in plan.parameters
        for index in ([(i,) for i in range(values[path].shape[0])] if ".layer." in path else [()])
    }
    rows = {
        path: TokenRowsArrays(np.asarray(plan.token_ids), np.asarray(values[f"decoder.{name}.rows"]))
        for name, path in _TABLES.items()
        if f"decoder.{name}.rows" in values
    }
    config = neutral.doubled_config(plan.config) if began_in_base else plan.config
    return AdapterWeights(config, low_rank, parameters, rows)


def detach(model: VLM) -> VLM:
    """Return the base of a model with adapters, its arrays shared.

    Raises:
      UserError: a model without adapters, or one of which whole parameters were trained: their former values are not
        known, so load the base instead.
    """
    plan = _plan(model)
    if plan.parameters:
        raise UserError(
            f"{len(plan.parameters)} parameters were trained whole beside the adapters ({plan.parameters[0]}, ...): "
            "their former values are in the base's folder, load that"
        )
    model = nnx.merge(*nnx.split(model))
    for group in plan.groups:
        module_of(model, group.path).adapter = nnx.static(None)
    for name in _TABLES:
        setattr(model.decoder, name, nnx.static(None))
    model.adapters = None
    return model


def _plan(model: VLM) -> AdapterPlan:
    if model.adapters is None:
        raise UserError("the model has no adapters")
    return model.adapters

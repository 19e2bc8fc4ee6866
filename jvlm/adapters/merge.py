"""An adapter's matrices added to its base's: sums in float64, each result rounded once.

Formulas: LoRA ``W + s a b``; DoRA (arXiv 2402.09353, section 4) scales its columns to the learned lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jvlm.adapters import peft_modules
from jvlm.adapters.attach import extract
from jvlm.adapters.weights import AdapterWeights, LowRank, Target, TokenRows
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.quantization.kernels import quantized_kernels
from jvlm.weights.vocabulary import EMBEDDING, HEAD

# Elements of a matrix that are summed at a time: 64 MiB in float64.
_BLOCK = 1 << 23


def merge_matrix(base: Float[np.ndarray, "i o"], low: LowRank) -> Float[np.ndarray, "i o"]:
    """Return ``base + scale * a @ b``, columns scaled to ``magnitude`` where there is one, as float32."""
    # row by row of the transpose, which is how checkpoints store a linear map
    rows, a = base.T, low.a.T.astype(np.float64)
    out = np.empty_like(rows, np.float32)
    height = max(1, _BLOCK // base.shape[0])
    for begin in range(0, len(rows), height):
        block = slice(begin, begin + height)
        total = rows[block].astype(np.float64)
        total += (low.b[:, block].T.astype(np.float64) * low.scale) @ a
        if low.magnitude is not None:
            norm = np.sqrt(np.einsum("oi,oi->o", total, total))
            total *= (low.magnitude[block].astype(np.float64) / norm)[:, None]
        out[block] = total
    return out.T


def needs_own_head(weights: AdapterWeights, config: VLMConfig) -> bool:
    """Return whether a model whose head is tied to its embedding must get a head of its own for an adapter.

    An adapter of one of the two says nothing of the other. Rows of single tokens, and a whole table, count for both.

    Raises:
      UserError: an adapter that does both.
    """
    if not config.decoder.tie_word_embeddings:
        return False
    needed = Target(EMBEDDING) in weights.low_rank or has_head(weights)
    if needed and EMBEDDING in weights.token_rows and HEAD not in weights.token_rows:
        raise UserError(
            "rows of tokens count for the embedding and the head of a tied model, and another part of the adapter "
            "unties them: train the rows of the head too, or leave one of both out"
        )
    return needed


def has_head(weights: AdapterWeights) -> bool:
    """Return whether an adapter has something for a head that is a matrix of its own."""
    return Target(HEAD) in weights.low_rank or Target(HEAD) in weights.parameters or HEAD in weights.token_rows


def merged_config(weights: AdapterWeights, config: VLMConfig) -> VLMConfig:
    """Return the configuration of the merged model: with a head of its own where the adapter needs one."""
    return peft_modules.untied(config) if needs_own_head(weights, config) else config


class Merged:
    """The parameters of a base with an adapter, one at a time: call it with a path and a layer, or None."""

    def __init__(self, weights: AdapterWeights, read_base: Callable[[str, int | None], np.ndarray]):
        self._weights, self._read_base = weights, read_base
        self._biases = {
            Target(_bias_path(target.path), target.index): low
            for target, low in weights.low_rank.items()
            if low.bias is not None
        }
        both = sorted(target.path for target in weights.low_rank if target in weights.parameters)
        if both:
            raise UserError(f"an adapter has both matrices for a parameter and the whole of it: {', '.join(both)}")

        self._low_rank: dict[tuple[str, int | None], list[tuple[tuple[int, ...], LowRank]]] = {}
        for target, low in weights.low_rank.items():
            layer = target.index[0] if target.index else None
            self._low_rank.setdefault((target.path, layer), []).append((target.index[1:], low))
        self._layers: dict[str, set[int | None]] = {path: {None} for path in weights.token_rows}
        for target in [*weights.low_rank, *weights.parameters, *self._biases]:
            self._layers.setdefault(target.path, set()).add(target.index[0] if target.index else None)

    def has(self, path: str) -> bool:
        """Return whether the adapter has something for a parameter, or for some layers of it."""
        return path in self._layers

    def layers(self, path: str) -> set[int | None]:
        """Return the layers of a parameter that the adapter has something for; None stands for the whole of it."""
        return self._layers.get(path, set())

    def changes(self, path: str, layer: int | None) -> bool:
        """Return whether the adapter has something for a layer of a parameter."""
        return layer in self.layers(path)

    def __call__(self, path: str, layer: int | None) -> np.ndarray:
        """Return the merged parameter: float32 where it was added to, else in the dtype of its file."""
        target = _target(path, layer)
        whole = self._weights.parameters.get(target)
        value = self._read_base(path, layer) if whole is None else whole
        adapters = self._low_rank.get((path, layer), [])
        if any(expert for expert, _ in adapters):
            value = np.array(value, np.float32)
        for expert, low in adapters:
            if expert:
                value[expert] = merge_matrix(value[expert], low)
            else:
                value = merge_matrix(value, low)
        if target in self._biases:
            low = self._biases[target]
            value = (value.astype(np.float64) + low.scale * low.bias.astype(np.float64)).astype(np.float32)
        if path in self._weights.token_rows:
            value = _with_rows(value, self._weights.token_rows[path], path)
        return value


def _with_rows(value: np.ndarray, rows: TokenRows, path: str) -> np.ndarray:
    value = np.array(value, np.float32)
    index = (slice(None), rows.token_ids) if path == HEAD else rows.token_ids
    value[index] = rows.rows.astype(np.float32).T if path == HEAD else rows.rows
    return value


def _target(path: str, layer: int | None) -> Target:
    return Target(path, () if layer is None else (layer,))


def _bias_path(path: str) -> str:
    return path.removesuffix("kernel") + "bias"


def check_targets(weights: AdapterWeights, paths: Collection[str]) -> None:
    """Raise UserError naming every target of an adapter that is none of the paths of a model's parameters."""
    wanted = {target.path for target in [*weights.low_rank, *weights.parameters]} | set(weights.token_rows)
    wanted |= {_bias_path(target.path) for target, low in weights.low_rank.items() if low.bias is not None}
    unknown = sorted(wanted - set(paths))
    if unknown:
        raise UserError(f"the model has no parameters of the adapter's targets {', '.join(unknown)}")


def untie(model: VLM) -> VLM:
    """Return a model whose head is a matrix of its own, with the values of the embedding that it was tied to."""
    if not model.config.decoder.tie_word_embeddings:
        return model
    _check_plain(model)
    values = {path: variable.get_value() for path, variable in vlm.parameters(model).items()}
    return _bound(model, peft_modules.untied(model.config), {**values, HEAD: values[EMBEDDING].T})


def merge(model: VLM, weights: AdapterWeights | None = None) -> VLM:
    """Return a model with an adapter's parts added to its own parameters, which stay where they are on devices.

    Args:
      model: left as it is.
      weights: None takes the adapters that are in the model.

    Raises:
      UserError: the adapter has a target that the model does not have.
    """
    weights = extract(model) if weights is None else weights
    config, values, merged = _parts(model, weights)
    changed = {path: _merged_parameter(merged, path, value) for path, value in values.items() if merged.has(path)}
    return _bound(model, config, {**values, **changed})


def merged_parameters(model: VLM) -> tuple[VLM, Callable[[str, int | None], np.ndarray]]:
    """Return the merged form of a model with adapters, abstract, and what gives its parameters one at a time.

    The second is called with a path and a layer, or None: no second copy of the model is made.
    """
    config, values, merged = _parts(model, extract(model))
    shapes = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in values.items()}
    return _bound(model, config, shapes), merged


def _parts(model: VLM, weights: AdapterWeights) -> tuple[VLMConfig, dict[str, jax.Array], Merged]:
    """Return the merged model's configuration, its parameters before merging, and after."""
    _check_plain(model)
    values = {path: variable.get_value() for path, variable in vlm.parameters(model).items()}
    config = merged_config(weights, model.config)
    if config is not model.config:
        values[HEAD] = values[EMBEDDING].T
    check_targets(weights, values)
    return (
        config,
        values,
        Merged(weights, lambda p, layer: np.asarray(values[p] if layer is None else values[p][layer])),
    )


def _check_plain(model: VLM) -> None:
    """Refuse a quantised base, of which the values that the adapter was made for are not at hand."""
    kernel = next((path for path, _ in quantized_kernels(model)), None)
    if kernel is not None:
        raise UserError(
            f"the model's base is quantised ({kernel}, ...): save the adapters (format 'peft'), and merge them into "
            "the folder of the base as it was (jvlm.adapters.merge_folder)"
        )


def _merged_parameter(merged: Merged, path: str, value: jax.Array) -> jax.Array:
    new = np.array(value)
    for layer in merged.layers(path):
        new[... if layer is None else layer] = merged(path, layer).astype(new.dtype)
    return jax.device_put(new, value.sharding)


def _bound(model: VLM, config: VLMConfig, values: Mapping[str, Any]) -> VLM:
    """Return a model of a configuration with given parameters, which keep the dtypes that their checkpoint had."""
    before, new = vlm.parameters(model), vlm.bind(vlm.abstract(config), values)
    for path, variable in vlm.parameters(new).items():
        metadata = before[path if path in before else EMBEDDING].get_metadata()
        if "stored" in metadata:
            variable.set_metadata(stored=metadata["stored"])
    return new

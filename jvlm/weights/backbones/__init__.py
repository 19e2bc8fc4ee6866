"""Vision towers and language models on their own: Hugging Face folders that become the encoder or decoder of a new VLM.

One file per family; each offers ``BACKBONES``, so adding one adds a file.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from jvlm import json_files
from jvlm.errors import UserError
from jvlm.models import contracts, registry, vlm
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.encoders.vit import ViTConfig
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLM
from jvlm.weights import hf, safetensors_files, table, vocabulary
from jvlm.weights.positions import resize_positions
from jvlm.weights.table import Rule, WeightError

TowerConfig = contracts.EncoderConfig | contracts.DecoderConfig


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A family of towers.

    Attributes:
      model_types: values of ``model_type`` in config.json that belong here.
      tower: which part of a model it becomes.
      rules: the table, given the tower's configuration; paths are those of the whole model.
      sizes: axis lengths that the patterns need.
      canonical: maps any known spelling of a tensor name to the one of the table; None drops the tensor.
      read_config: config.json to the tower's configuration.
    """

    model_types: tuple[str, ...]
    tower: Literal["encoder", "decoder"]
    rules: Callable[[Any], Iterable[Rule]]
    canonical: Callable[[str], str | None]
    read_config: Callable[[dict[str, Any]], TowerConfig]
    sizes: Callable[[Any], dict[str, int]] = lambda config: {}


def read_config(folder: str | Path) -> TowerConfig:
    """Return the encoder or decoder configuration of a folder's config.json.

    Raises:
      UserError: no config.json.
      WeightError: a family or an option that is not supported.
    """
    return _open(Path(folder))[1]


def load(
    folder: str | Path, config: TowerConfig, precision: Precision, sharding: hf.ShardingOf | None = None
) -> dict[str, nnx.Variable]:
    """Parameters of a tower, by their path in the whole model.

    Args:
      config: of the tower that they are for. It must be what the folder describes, but may have another grid (the
        position table is interpolated) and more words (each new one begins as the mean of the old ones).

    Raises:
      WeightError: another family or size, or tensors that are wrong, missing or superfluous, all of them listed.
    """
    folder = Path(folder)
    backbone, tower_config = _open(folder)
    _check_same(folder, backbone, tower_config, config)
    variables, expected = _expected(backbone, tower_config, precision)
    with safetensors_files.Tensors(folder) as tensors:
        stored = hf.match(tensors, backbone.canonical, expected)
        hf.read_parameters(variables, expected, stored, tensors, sharding)
    return _resized(variables, tower_config, config)


def _expected(
    backbone: Backbone, config: TowerConfig, precision: Precision
) -> tuple[dict[str, nnx.Variable], list[table.Entry]]:
    """Return abstract parameters of a tower, by their path in the whole model, and the tensors that they come from."""
    build = functools.partial(registry.build, config, precision=precision)
    module = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    variables = {".".join((backbone.tower, *map(str, path))): variable for path, variable in state}
    shapes = {path: tuple(v.get_value().shape) for path, v in variables.items()}
    return variables, table.expand(backbone.rules(config), backbone.sizes(config), shapes)


def check_tensors(source: Path, values: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that tensors, name -> shape, are all that a tower of these values of config.json is read from.

    Raises:
      WeightError: naming the source, and every tensor that is wrong, missing or superfluous.
    """
    backbone, config = _family(source, values)
    table.check(_expected(backbone, config, Precision())[1], shapes, str(source))


def fill(model: VLM, folders: Iterable[str | Path], sharding: hf.ShardingOf | None = None) -> VLM:
    """Return the model with the towers that the folders hold in place of its own; see `load`."""
    values = {path: variable.get_value() for path, variable in vlm.parameters(model).items()}
    for folder in folders:
        backbone, _ = _open(Path(folder))
        tower = getattr(model.config, backbone.tower)
        variables = load(folder, tower, model.config.precision, sharding)
        values.update((path, variable.get_value()) for path, variable in variables.items())
    return vlm.bind(model, values)


def _check_same(folder: Path, backbone: Backbone, stored: TowerConfig, config: TowerConfig) -> None:
    free = {"grid", "image_mean", "image_std", "mrope_section", "max_position_embeddings"}
    differences = [
        f"{field.name}: {getattr(stored, field.name)!r} in the folder, {getattr(config, field.name, None)!r} here"
        for field in dataclasses.fields(stored)
        if field.name not in free and getattr(stored, field.name) != getattr(config, field.name, None)
    ]
    if getattr(config, "vocab_size", 0) > getattr(stored, "vocab_size", 0):
        differences = [line for line in differences if not line.startswith("vocab_size:")]
    if differences:
        raise WeightError(f"{folder} holds another {backbone.tower}:\n  " + "\n  ".join(differences))


def _resized(variables: dict[str, nnx.Variable], stored: TowerConfig, config: TowerConfig) -> dict[str, nnx.Variable]:
    """Position tables at the wanted size; new words begin as the mean of the old ones."""
    if isinstance(stored, ViTConfig) and stored.grid != config.grid:
        old = np.asarray(variables["encoder.positions"].get_value())
        _replace(variables["encoder.positions"], resize_positions(old, config.grid, class_token=stored.class_token))
    elif isinstance(stored, TransformerConfig) and stored.vocab_size < config.vocab_size:
        for path in vocabulary.TOKEN_AXIS.keys() & variables.keys():
            old = variables[path].get_value()
            _replace(variables[path], vocabulary.with_rows(old, config.vocab_size, vocabulary.TOKEN_AXIS[path]))
    return variables


def _replace(variable: nnx.Variable, value: jax.typing.ArrayLike) -> None:
    variable.set_value(jax.device_put(value, variable.get_value().sharding))


def _open(folder: Path) -> tuple[Backbone, TowerConfig]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: a tower is read from a local Hugging Face folder")
    return _family(path, json_files.read_object(path))


def _family(path: Path, values: dict[str, Any]) -> tuple[Backbone, TowerConfig]:
    for backbone in backbones():
        if values.get("model_type") in backbone.model_types:
            return backbone, table.read_values(path, backbone.read_config, values)
    known = ", ".join(sorted(t for b in backbones() for t in b.model_types))
    raise WeightError(
        f"{path}: model_type {values.get('model_type')!r} is not supported as a tower; supported: {known}"
    )


@functools.cache
def backbones() -> tuple[Backbone, ...]:
    """Every family."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return tuple(b for module in modules for b in getattr(module, "BACKBONES", ()))

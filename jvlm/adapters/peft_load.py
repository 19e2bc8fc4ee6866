"""A model with the adapter of a PEFT folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jvlm.adapters import folders, merge, peft_config, peft_read
from jvlm.adapters.attach import attach
from jvlm.adapters.weights import AdapterWeights, Target
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.weights.hf import ShardingOf

_VERBS = (
    "to go on with its weights, give its base as init_from and the adapter as adapters_from; to train a new adapter on "
    "top, merge it into its base and give the merged folder as init_from; to resume the run that made it, start that "
    "run again under its name"
)


def base_of(folder: str | Path) -> str:
    """Return the folder, or id on the Hub, of the base that an adapter names.

    Raises:
      UserError: it names none.
    """
    path = peft_read.find_folder(folder) / peft_config.FILE
    base = peft_config.read(path).base
    if base is None:
        raise UserError(
            f"{path} does not name its base (base_model_name_or_path): give the base, and {folder} as adapter"
        )
    return base


def refuse_as_start(source: str | Path) -> None:
    """Raise UserError, naming what to do instead, for the folder of an adapter where a whole model is wanted."""
    if peft_read.is_adapter(source):
        raise UserError(f"{source} holds an adapter and no model: {_VERBS}")


def with_adapter(model: VLM, source: str | Path, sharding: ShardingOf | None = None) -> VLM:
    """Return a model with the adapter of a PEFT folder, or of a run, in it; see `attach` and `folders.read`.

    A head that is tied to the embedding becomes a matrix of its own, where the adapter has something for it.
    """
    weights = read_beside(model, source)
    if merge.needs_own_head(weights, model.config) and merge.has_head(weights):
        model = merge.untie(model)
    return attach(model, weights, sharding=sharding)


def read_beside(model: VLM, source: str | Path) -> AdapterWeights:
    """Return the adapter of a folder for a model, whose parameters are there for what refers to them."""
    values = {path: variable.get_value() for path, variable in vlm.parameters(model).items()}

    def read_base(target: Target) -> np.ndarray:
        return np.asarray(values[target.path][target.index])

    return folders.read(source, model.config, read_base)

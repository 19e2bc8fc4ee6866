"""Models that give scores in the place of a next token: what config.json says of them, and a language model made one.

The layout is that of transformers' ForSequenceClassification: ``num_labels`` and a matrix ``score.weight`` [labels,
width], applied to the last token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.weights.vocabulary import HEAD

SCORE = "decoder.score.kernel"
ARCHITECTURE = "ForSequenceClassification"


def count_of(values: Mapping[str, Any]) -> int | None:
    """Return the labels of a config.json; None for a language model. transformers leaves two labels out."""
    if not any(str(name).endswith(ARCHITECTURE) for name in values.get("architectures") or ()):
        return None
    return int(values.get("num_labels") or len(values.get("id2label") or (0, 1)))


def fields_of(count: int, architectures: list[str]) -> dict[str, Any]:
    """Return what a config.json says of so many labels."""
    names = [name.partition("For")[0] + ARCHITECTURE for name in architectures]
    numbers = {str(i): f"LABEL_{i}" for i in range(count)}
    label2id = {label: int(number) for number, label in numbers.items()}
    return {"architectures": names, "num_labels": count, "id2label": numbers, "label2id": label2id}


def read(values: Mapping[str, Any], config: VLMConfig) -> VLMConfig:
    """Return the configuration with the labels of a config.json."""
    return with_count(config, count_of(values))


def write(config: VLMConfig, write_config: Callable[[VLMConfig], dict[str, Any]]) -> dict[str, Any]:
    """Return the content of config.json, given what writes that of a language model."""
    count = getattr(config.decoder, "labels", None)
    values = write_config(with_count(config, None))
    return values if count is None else {**values, **fields_of(count, values["architectures"])}


def with_count(config: VLMConfig, count: int | None) -> VLMConfig:
    """Return the configuration with so many labels."""
    if getattr(config.decoder, "labels", None) == count:
        return config
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, labels=count))


def with_labels(model: VLM, count: int, *, seed: int = 0, sharding: Callable[..., Any] | None = None) -> VLM:
    """Return a language model with a new matrix of scores in the place of its head; all else is shared.

    The matrix is drawn from a normal distribution of variance 1 / (width + 1), as InstructGPT's (arXiv 2203.02155).

    Args:
      sharding: of a parameter, from its path and variable; None puts it on the first device.

    Raises:
      UserError: a model with adapters, or a decoder that has no scores.
    """
    if model.adapters is not None:
        raise UserError("a model with adapters cannot become a reward model: merge them first (jvlm merge-lora)")
    if not hasattr(model.config.decoder, "labels"):
        raise UserError(f"a {type(model.config.decoder).__name__} gives no scores: it cannot become a reward model")
    if model.config.decoder.labels == count:
        return model
    template = vlm.abstract(with_count(model.config, count))
    values = {path: v.get_value() for path, v in vlm.parameters(model).items() if path not in (HEAD, SCORE)}
    variable = vlm.parameters(template)[SCORE]
    shape, dtype = variable.get_value().shape, variable.get_value().dtype
    matrix = np.random.default_rng([seed, count]).standard_normal(shape) / np.sqrt(shape[0] + 1)
    place = sharding(SCORE, variable) if sharding else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return vlm.bind(template, {**values, SCORE: jax.device_put(matrix.astype(dtype), place)})

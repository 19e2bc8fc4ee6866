"""Embedding tables with more rows, for tokens that a checkpoint was not trained with."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jvlm.models import vlm
from jvlm.models.vlm import VLM, VLMConfig

EMBEDDING, HEAD = "decoder.embedding", "decoder.head.kernel"
# The axis of the tokens in each table that has one; a tied model has no head.
TOKEN_AXIS = {EMBEDDING: 0, HEAD: 1}
Table = TypeVar("Table", np.ndarray, jax.Array)


def with_rows(table: Table, rows: int, axis: int = 0) -> Table:
    """Return a table with so many tokens on an axis, each new one the mean of the old ones.

    The mean keeps the new tokens' logits near the average, so that they do not drown out trained ones
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    xp, precision = (np, np.float64) if isinstance(table, np.ndarray) else (jnp, jnp.float32)
    mean = table.mean(axis, keepdims=True, dtype=precision).astype(table.dtype)
    return xp.concatenate([table, xp.repeat(mean, rows - table.shape[axis], axis)], axis)


def with_vocabulary(config: VLMConfig, rows: int) -> VLMConfig:
    """Return the configuration with tables of at least so many rows."""
    if rows <= config.decoder.vocab_size:
        return config
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=rows))


def grow(model: VLM, config: VLMConfig) -> VLM:
    """Return the model with the tables of a configuration from `with_vocabulary`, where they were."""
    if config == model.config:
        return model
    values = {path: variable.get_value() for path, variable in vlm.parameters(model).items()}
    for path in TOKEN_AXIS.keys() & values.keys():
        axis, old = TOKEN_AXIS[path], values[path]
        resize = jax.jit(with_rows, static_argnums=(1, 2), out_shardings=old.sharding)
        values[path] = resize(old, config.decoder.vocab_size, axis)
    return vlm.bind(vlm.abstract(config), values)

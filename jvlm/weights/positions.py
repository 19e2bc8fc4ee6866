"""Position tables of vision towers at another size, so that a tower can see larger images than it was trained on."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.vlm import VLM, VLMConfig

_A = -0.75  # of the cubic convolution, as in torch


def resize_positions(
    table: Float[np.ndarray, "n D"], grid: int, *, class_token: bool = False, scale: float | None = None
) -> Float[np.ndarray, "m D"]:
    """Return a square position table interpolated to ``grid`` x ``grid`` (bicubic, corners not aligned, as in torch).

    Args:
      class_token: the first vector belongs to the class token and stays as it is.
      scale: ratio of the new side to the old that places samples, where it is not that of the sizes: SigLIP's step
        from 27 to 70 for Idefics2, and DINOv2's first code, used (70 + 0.1) / 27.

    Raises:
      UserError: a table that is not square.
    """
    first, vectors = (table[:1], table[1:]) if class_token else (table[:0], table)
    side = round(len(vectors) ** 0.5)
    if side * side != len(vectors):
        raise UserError(f"a position table of {len(vectors)} vectors is not square")
    if side == grid and scale is None:
        return table
    weights = _cubic(side, grid, grid / side if scale is None else scale)
    cells = vectors.astype(np.float64).reshape(side, side, -1)
    new = np.einsum("ij,kl,jld->ikd", weights, weights, cells, optimize=True).reshape(grid * grid, -1)
    return np.concatenate([first, new.astype(table.dtype)])


def _cubic(old: int, new: int, scale: float) -> np.ndarray:
    """Return [new, old]: how much of each old vector is in each new one; beyond the edge the last is repeated."""
    at = (np.arange(new) + 0.5) / scale - 0.5
    first = np.floor(at).astype(int) - 1
    taps = first[:, None] + np.arange(4)
    distance = np.abs(at[:, None] - taps)
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new)[:, None], np.clip(taps, 0, old - 1)), np.where(distance <= 1, near, far))
    return weights


def with_grid(model: VLM, grid: int, scale: float | None = None) -> VLM:
    """Return the same model for images of ``grid`` x ``grid`` patches: position tables interpolated, all else shared.

    Args:
      scale: see `resize_positions`.

    Raises:
      UserError: the encoder has no position table.
    """
    config = model.config
    resized = config_with_grid(config, grid)
    values = {path: variable.get_value() for path, variable in vlm.parameters(model).items()}
    for path, class_token in (("encoder.positions", config.encoder.class_token), ("connector.positions", False)):
        if path in values:
            table = resize_positions(np.asarray(values[path], np.float32), grid, class_token=class_token, scale=scale)
            values[path] = jnp.asarray(table, values[path].dtype)
    return vlm.bind(vlm.abstract(resized), values)


def config_with_grid(config: VLMConfig, grid: int) -> VLMConfig:
    """Return the configuration of `with_grid`'s model. Raises UserError if the encoder has no position table."""
    if not hasattr(config.encoder, "grid"):
        raise UserError(f"{type(config.encoder).__name__} has no position table: it takes images of any size")
    parts = {name: getattr(config, name) for name in ("encoder", "connector")}
    parts = {name: dataclasses.replace(part, grid=grid) for name, part in parts.items() if hasattr(part, "grid")}
    return dataclasses.replace(config, **parts)

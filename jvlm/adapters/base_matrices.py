"""The matrices of a base that adapters stand beside: where each is in a model, its shape, and its values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jvlm.adapters.layers import LowRankAdapter
from jvlm.models import vlm
from jvlm.models.layers import StoredKernel
from jvlm.models.vlm import VLM


def module_of(model: VLM, path: str) -> nnx.Module:
    """Return the module whose attribute ``adapter`` is the adapter of the parameter at a dotted path."""
    *parents, name = path.split(".")
    module: Any = model
    for part in parents:
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    # a module with several matrices, as a layer of experts, has a slot for each
    return module if name in ("kernel", "embedding") else getattr(module, f"{name}_slot")


def adapter_of(model: VLM, path: str) -> LowRankAdapter:
    """Return the adapter that stands beside a parameter."""
    return module_of(model, path).adapter


def adapter_path(path: str) -> str:
    """Return the path of the adapter of a parameter."""
    before, _, name = path.rpartition(".")
    return f"{before}.adapter" if name in ("kernel", "embedding") else f"{before}.{name}_slot.adapter"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A parameter of the base, or a quantised kernel.

    Attributes:
      read: gives the matrix at an index of the leading axes, on the host; None where there are only shapes.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    read: Callable[[tuple[int, ...]], np.ndarray] | None

    @property
    def is_of_experts(self) -> bool:
        """Whether it is a matrix of each of a layer's experts."""
        return self.axes[:-2] == ("experts",)


def matrices(model: VLM) -> dict[str, Matrix]:
    """Return path -> matrix, for all parameters of the base; quantised kernels under the paths of plain ones."""
    result = {}
    for path, variable in vlm.parameters(model).items():
        value, axes = variable.get_value(), tuple(variable.get_metadata()["axes"])
        is_shape = isinstance(value, jax.ShapeDtypeStruct)
        read = None if is_shape else lambda index, value=value: np.asarray(value[index])
        result[path] = Matrix(tuple(value.shape), axes, read)
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

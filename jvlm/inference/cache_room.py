"""How many pages of a cache the memory holds."""

from __future__ import annotations

import jax
import psutil
from flax import nnx

from jvlm.errors import UserError
from jvlm.inference.requests import EngineConfig
from jvlm.models.batch import CacheSizes
from jvlm.models.vlm import VLM
from jvlm.parallel.layout import MeshLayout
from jvlm.units import GIB


def pages_within(model: VLM, config: EngineConfig, fraction: float, layout: MeshLayout | None = None) -> int:
    """Return how many pages the cache has where it and the parameters take a share of the memory at most.

    No more than ``max_slots`` answers of ``max_model_len`` tokens need.

    Args:
      fraction: of the memory of the devices, or of the machine on a CPU.

    Raises:
      UserError: a share that does not hold the parameters and one answer of ``max_model_len`` tokens.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--memory_fraction is {fraction}; it must be above 0 and at most 1")
    devices = jax.local_devices()[:1] if layout is None else list(layout.mesh.devices.flat)
    memory = sum(map(_memory, devices)) if devices[0].platform != "cpu" else psutil.virtual_memory().total
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    page_size = config.page_size or (128 if jax.default_backend() == "tpu" else 16)
    page = _bytes(model, config, page_size, 3) - _bytes(model, config, page_size, 2)
    length = config.max_model_len or model.config.decoder.max_position_embeddings
    of_answer = -(-length // page_size) + 1
    pages = int(memory * fraction - parameters) // page
    if pages < of_answer + 1:
        raise UserError(
            f"--memory_fraction {fraction} of {memory / GIB:.1f} GiB leaves {max(pages, 0)} pages beside "
            f"{parameters / GIB:.1f} GiB of parameters, and an answer of {length} tokens takes {of_answer}: raise it, "
            "or lower --max_model_len"
        )
    return min(pages, config.max_slots * of_answer + 1)


def _memory(device: jax.Device) -> int:
    return device.memory_stats()["bytes_limit"]


def _bytes(model: VLM, config: EngineConfig, page_size: int, pages: int) -> int:
    sizes = CacheSizes(pages, page_size, config.max_slots)
    cache = jax.eval_shape(lambda: model.decoder.init_cache(sizes))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

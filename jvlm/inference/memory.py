"""How many pages of the cache fit into a share of the memory: of a device, or of the machine on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import psutil

from jvlm.errors import UserError
from jvlm.inference import plan_arrays
from jvlm.inference.device_state import picture_batch, vision_tokens_of

if TYPE_CHECKING:
    from jvlm.inference.device_state import DeviceState

OF_ACCELERATORS = 0.9  # of a GPU's or a TPU's memory, where the configuration names no share


def share(devices: Sequence[Any], fraction: float | None) -> float | None:
    """Return the share of the memory that an engine may take; None where nothing limits it.

    Args:
      fraction: `EngineConfig.memory_fraction`.

    Raises:
      UserError: a share was given of devices that do not say how much memory they have.
    """
    asked = OF_ACCELERATORS if fraction is None else fraction
    limited = fraction is not None or devices[0].platform != "cpu"
    if not limited or free_bytes(devices, asked) is not None:
        return asked if limited else None
    if fraction is not None:
        raise UserError(
            f"memory_fraction is {fraction}, and {devices[0]} does not say how much memory it has: leave it out, and "
            "lower max_slots or max_model_len where the cache is too large"
        )
    return None


def free_bytes(devices: Sequence[Any], fraction: float) -> int | None:
    """Return the least bytes of a device that are left below a fraction of its memory; None where it does not say.

    The devices of a CPU share the machine's memory and what this process takes of it.
    """
    if devices[0].platform == "cpu":
        total, used = psutil.virtual_memory().total, psutil.Process().memory_info().rss
        return int(fraction * total - used) // len(devices)
    found = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        found.append(int(fraction * stats["bytes_limit"]) - stats["bytes_in_use"])
    return min(found)


def bytes_of_a_page(state: DeviceState) -> int:
    """Return the bytes that a page of every layer takes on one device."""
    cache = jax.eval_shape(state.programs.init_cache, state.engine._decoder_leaves)
    pages = state.programs.sizes.pages
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache) if x.shape[1] == pages)
    devices = 1 if state.programs.ops is None else state.programs.ops.layout.mesh.size
    return -(-whole * state.shapes.groups // (pages * devices))


def temporary_bytes(state: DeviceState) -> int:
    """Return the most bytes that a program takes beside what stays: of the longest prefill and the largest encode."""
    s, config, programs = state.shapes, state.engine.config, state.programs
    nobody = programs.put(np.zeros(s.groups, np.int32), "batch")
    chunks = plan_arrays.no_chunks(
        s, s.prefill_tokens[-1], s.past[-1], (s.prefill_features or (s.prefill_tokens[-1],))[-1]
    )
    chunks = type(chunks)(*(programs.put(part, "batch", *[None] * (part.ndim - 1)) for part in chunks))
    lowered = [programs.prefill.lower(state.engine._decoder_leaves, state.pages(), state.pool(), chunks, nobody)]
    if s.encode_patches[-1] and s.feature_slots:
        P = s.encode_patches[-1]
        batch = picture_batch(config, s.groups, P)
        if programs.ops is not None:
            batch = jax.device_put(batch, programs.ops.layout.batch(batch))
        slots = np.full((s.groups, vision_tokens_of(config, P)), s.feature_slots, np.int32)
        slots = programs.put(slots, "batch", None)
        lowered.append(programs.encode.lower(state.engine._leaves, state.pool(), batch, slots, nobody))
    found = [one.compile().memory_analysis() for one in lowered]
    return max(one.temp_size_in_bytes + one.output_size_in_bytes - one.alias_size_in_bytes for one in found)


def pages_that_fit(state: DeviceState, devices: Sequence[Any], fraction: float) -> int:
    """Return the most pages of each group, with everything but pages on the devices.

    Args:
      state: with few pages.
      fraction: of the memory, as `share` returns it.

    Raises:
      UserError: there is no room for one answer.
    """
    temporary, page = temporary_bytes(state), bytes_of_a_page(state)
    state.last_tokens(), state.slot_rules()
    jax.block_until_ready((state.pages(), state.pool()))
    left = free_bytes(devices, fraction) - temporary
    pages = left // page + state.shapes.pages
    least = state.shapes.tables[-1] + 1
    if pages < least:
        raise UserError(
            f"{max(pages, 0)} pages of {page:,} bytes fit into memory_fraction {fraction:g} beside the parameters and "
            f"{temporary:,} bytes of the largest program, and one answer may need {least}: raise memory_fraction, "
            "lower max_model_len, prefill_tokens or encode_patches, or take a narrower kv_cache_dtype"
        )
    return pages

"""The golden tiny Qwen2.5-VL quantised, and a batch for it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from jvlm.models.batch import PackedBatch
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.training.supervised import supervised_loss
from tests.parallel import models
from tests.support import GOLDEN

FOLDER = GOLDEN / "qwen2_5_vl_tiny"


def with_experts(count: int) -> VLMConfig:
    """A small Qwen3-VL with experts, whose matrices blocks of 64 divide."""
    config = models.qwen3_vl()
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mrope_section": (4, 2, 2)}
    experts = MoEConfig(every=1, experts=count, top_k=2, intermediate_size=64)
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **sizes, mlp=experts))


def text_batch(model: VLM, *, rows: int = 2, tokens: int = 24, seed: int = 0) -> PackedBatch:
    """Random text: each sequence is one conversation, of which all is supervised."""
    ids = np.random.default_rng(seed).integers(4, 400, (rows, tokens)).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32)[None, :, None], (rows, tokens, 3))
    patch_values = 3 * 2 * 14 * 14
    return PackedBatch(
        tokens=ids,
        segment_ids=np.ones_like(ids),
        positions=np.ascontiguousarray(positions),
        loss_weights=np.ones(ids.shape, np.float32),
        patches=np.zeros((rows, 0, patch_values), np.float32),
        patch_segment_ids=np.zeros((rows, 0), np.int32),
        patch_window_ids=np.zeros((rows, 0), np.int32),
        patch_positions=np.zeros((rows, 0, 2), np.int32),
        vision_index=np.full(ids.shape, -1, np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def _value_and_grad(graph, chosen, rest, batch):
    def loss(chosen):
        return supervised_loss(nnx.merge(graph, nnx.from_flat_state({**rest, **chosen}.items())), batch).total

    return jax.value_and_grad(loss)(chosen)


def loss_and_gradients(
    model: VLM, batch: PackedBatch, is_chosen: Callable[[tuple, nnx.Variable], bool]
) -> tuple[float, dict[tuple, Any]]:
    """Return the loss and its gradient by path of the variables that ``is_chosen`` is true of."""
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    chosen = {path: v for path, v in flat.items() if is_chosen(path, v)}
    loss, gradients = _value_and_grad(graph, chosen, {p: v for p, v in flat.items() if p not in chosen}, batch)
    return float(loss), {path: np.asarray(v.get_value()) for path, v in gradients.items()}

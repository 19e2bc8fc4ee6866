"""The golden tiny Qwen2.5-VL quantised, and a batch for it."""

from __future__ import annotations

import numpy as np

from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from tests.support import GOLDEN

FOLDER = GOLDEN / "qwen2_5_vl_tiny"


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

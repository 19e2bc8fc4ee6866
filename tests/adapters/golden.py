"""The golden adapters: tiny models with adapters that PEFT made, and what torch gave for them; see the README there."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from jvlm.adapters import peft_config
from jvlm.adapters.peft_read import TENSORS, read_peft
from jvlm.adapters.weights import AdapterWeights
from jvlm.data.merged_images import window_order
from jvlm.families.idefics2.image_processor import table_positions
from jvlm.models.batch import PackedBatch
from jvlm.weights import hf
from tests.support import GOLDEN

ROOT = GOLDEN / "adapters"
IMAGE = 93
CASES = [
    *(("qwen2_5_vl", name) for name in "lora rslora dora dora_conv_embed conv_embed bias_and_saved".split()),
    *(("idefics2", name) for name in "lora dora dora_conv_embed".split()),
]


@functools.cache
def base(family: str):
    folder = ROOT / family / "base"
    return hf.load_weights(folder, hf.read_config(folder))


@functools.cache
def batch(family: str) -> PackedBatch:
    """The golden inputs as one packed sequence, with the golden loss's weights."""
    found = load_file(ROOT / family / "inputs.safetensors")
    tokens = found["input_ids"]
    weights = (tokens != IMAGE).astype(np.float32)
    weights[:, :4] = 0
    images = _qwen_images(found) if family == "qwen2_5_vl" else _idefics2_images(found)
    if family == "qwen2_5_vl":
        positions = found["position_ids"].transpose(1, 2, 0)
    else:
        positions = np.repeat(np.arange(tokens.shape[1])[None, :, None], 3, -1)
    order = images.pop("order")
    index = np.full(tokens.shape, -1, np.int32)
    index[tokens == IMAGE] = order
    return PackedBatch(
        tokens=tokens.astype(np.int32),
        segment_ids=np.ones_like(tokens, np.int32),
        positions=positions.astype(np.int32),
        loss_weights=weights,
        vision_index=index,
        **{name: value[None] for name, value in images.items()},
    )


def _qwen_images(found):
    """Patches of 2 x 2 cells in window order; windows are 4 x 4 cells."""
    cells, ids, windows, places, orders = [], [], [], [], []
    begin = cell = window_count = 0
    for number, (t, h, w) in enumerate(found["image_grid_thw"], 1):
        count = t * h * w
        order, window = window_order((t, h // 2, w // 2), 4)
        pixels = found["pixel_values"][begin : begin + count].reshape(-1, 4, 96)
        rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
        place = (
            np.stack([rows, columns], -1).reshape(h // 2, 2, w // 2, 2, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 4, 2)
        )
        cells.append(pixels[order].reshape(count, -1))
        places.append(place[order].reshape(count, 2))
        ids.append(np.full(count, number))
        windows.append(np.repeat(window + window_count, 4))
        orders.append(np.argsort(order) + cell)
        begin, cell, window_count = begin + count, cell + count // 4, window_count + window.max()
    return {
        "patches": np.concatenate(cells),
        "patch_segment_ids": np.concatenate(ids).astype(np.int32),
        "patch_window_ids": np.concatenate(windows).astype(np.int32),
        "patch_positions": np.concatenate(places).astype(np.int32),
        "order": np.concatenate(orders),
    }


def _idefics2_images(found):
    patches, ids, places = [], [], []
    pairs = zip(found["pixel_values"][0], found["pixel_attention_mask"][0], strict=True)
    for number, (pixels, mask) in enumerate(pairs, 1):
        h, w = int(mask[:, 0].sum()) // 4, int(mask[0].sum()) // 4
        cut = pixels[:, : 4 * h, : 4 * w].reshape(3, h, 4, w, 4).transpose(1, 3, 0, 2, 4)
        patches.append(cut.reshape(h * w, -1))
        ids.append(np.full(h * w, number))
        grid = np.stack(np.meshgrid(table_positions(h, 8), table_positions(w, 8), indexing="ij"), -1)
        places.append(grid.reshape(-1, 2))
    ids = np.concatenate(ids).astype(np.int32)
    return {
        "patches": np.concatenate(patches),
        "patch_segment_ids": ids,
        "patch_window_ids": ids,
        "patch_positions": np.concatenate(places).astype(np.int32),
        "order": np.arange(4 * len(found["pixel_values"][0])),
    }


def expected(family: str, case: str) -> dict[str, np.ndarray]:
    return load_file(ROOT / family / case / "expected.safetensors")


@functools.cache
def weights(family: str, case: str) -> AdapterWeights:
    return read_peft(ROOT / family / case, base(family).config)


def expected_gradients(family: str, case: str) -> AdapterWeights:
    """d loss / d tensor, where an adapter has the tensor: read as an adapter with these numbers."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(ROOT / family / case / peft_config.FILE, Path(folder) / peft_config.FILE)
        shutil.copyfile(ROOT / family / case / "expected_gradients.safetensors", Path(folder) / TENSORS)
        return read_peft(folder, base(family).config)

"""A small checkpoint with the outputs that transformers 5.17 gave for it: nothing of torch is needed here."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

from jvlm.data.merged_images import window_order
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.weights import hf
from tests import quick
from tests.support import GOLDEN

FOLDER = GOLDEN / "qwen2_5_vl_tiny"


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    found = dict(np.load(FOLDER / "inputs.npz"))
    found["pixel_values"] = rng.standard_normal((304, 1176)).astype(np.float32)
    found["pixel_values_videos"] = rng.standard_normal((288, 1176)).astype(np.float32)
    assert found["pixel_values"].sum(dtype=np.float64) == pytest.approx(214.61254877841566)
    assert found["pixel_values_videos"].sum(dtype=np.float64) == pytest.approx(654.8275600786296)
    return found


@pytest.fixture(scope="module")
def outputs():
    return load_file(FOLDER / "outputs.safetensors")


@pytest.fixture(scope="module")
def model():
    return hf.load_weights(FOLDER, hf.read_config(FOLDER))


def lay_out(inputs, positions):
    """The golden inputs as one packed sequence: patches into window order, the ids that go with them."""
    grids = [(g, inputs["pixel_values"]) for g in inputs["image_grid_thw"]]
    grids += [(g, inputs["pixel_values_videos"]) for g in inputs["video_grid_thw"]]
    used = {id(inputs["pixel_values"]): 0, id(inputs["pixel_values_videos"]): 0}
    patches, frames, windows, places, features = [], [], [], [], []
    for (t, h, w), source in grids:
        count, begin = t * h * w, used[id(source)]
        used[id(source)] += count
        order, window = window_order((t, h // 2, w // 2), 4)
        cells = source[begin : begin + count].reshape(-1, 4, 1176)
        rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
        place = np.stack([rows, columns], -1).reshape(h // 2, 2, w // 2, 2, 2).transpose(0, 2, 1, 3, 4)
        place = np.tile(place.reshape(-1, 4, 2), (t, 1, 1))
        frame = np.repeat(np.arange(t), h * w // 4)[order]
        patches.append(cells[order].reshape(count, -1))
        places.append(place[order].reshape(count, 2))
        frames.append(np.repeat(frame + 1 + (frames[-1].max() if frames else 0), 4))
        windows.append(np.repeat(window + (windows[-1].max() if windows else 0), 4))
        features.append(np.argsort(order) + sum(len(f) for f in features))
    tokens = inputs["input_ids"].astype(np.int32)
    vision_index = np.full(tokens.shape, -1, np.int32)
    vision_index[np.isin(tokens, [500, 501])] = np.concatenate(features)
    return PackedBatch(
        tokens=tokens,
        segment_ids=np.ones_like(tokens),
        positions=positions.transpose(1, 2, 0).astype(np.int32),
        loss_weights=np.zeros(tokens.shape, np.float32),
        patches=np.concatenate(patches)[None],
        patch_segment_ids=np.concatenate(frames)[None].astype(np.int32),
        patch_window_ids=np.concatenate(windows)[None].astype(np.int32),
        patch_positions=np.concatenate(places)[None].astype(np.int32),
        vision_index=vision_index,
    )


def test_logits_equal_the_golden_ones(model, inputs, outputs):
    batch = lay_out(inputs, outputs["position_ids"])
    np.testing.assert_allclose(np.asarray(model(batch)), outputs["logits"], atol=1e-4)


def test_image_features_equal_the_golden_ones(model, inputs, outputs):
    batch = lay_out(inputs, outputs["position_ids"])
    images = batch.vision_index[batch.tokens == 500]
    features = np.asarray(quick.call(VLM.encode, model, batch).tokens)[0]
    np.testing.assert_allclose(features[images], outputs["image_embeds"], atol=1e-4)


def test_the_first_golden_greedy_token_is_the_most_likely_one(model, inputs, outputs):
    batch = dataclasses.replace(lay_out(inputs, outputs["position_ids"]))
    length = batch.tokens.shape[1]
    assert int(np.asarray(model(batch))[0, -1].argmax()) == int(outputs["generated"][0, length])

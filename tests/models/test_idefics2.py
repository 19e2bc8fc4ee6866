"""Idefics2 computes what transformers computes: features, logits, gradients; packed conversations stay apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from jvlm.data import packing
from jvlm.families.idefics2.image_processor import table_positions
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM
from jvlm.weights import hf, table
from tests import quick
from tests.idefics2 import CASES, create, hf_inputs
from tests.support import GOLDEN

SHAPE = {"seq_len": 256, "max_patches": 512}
SPLIT = {"seq_len": 256, "max_patches": 1024}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return create(tmp_path_factory.mktemp("idefics2"), split=False)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return create(tmp_path_factory.mktemp("idefics2_split"), split=True)


def torch_logits(tiny, example):
    with torch.no_grad():
        return tiny.torch_model(**hf_inputs(tiny, example)).logits.numpy()[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["tiny", "split"])
def test_logits_equal_transformers(request, kind, name):
    tiny = request.getfixturevalue(kind)
    batch = tiny.processor.pack([CASES[name]], **(SPLIT if kind == "split" else SHAPE))
    expected = torch_logits(tiny, CASES[name])
    np.testing.assert_allclose(np.asarray(tiny.model(batch))[0, : len(expected)], expected, atol=1e-4)


def test_vision_features_and_resampled_ones_equal_transformers_for_each_picture(tiny):
    example = CASES["three pictures of different sizes"]
    batch, inputs = tiny.processor.pack([example], **SHAPE), hf_inputs(tiny, example)
    with torch.no_grad():
        found = tiny.torch_model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"])
    ours = np.asarray(nnx.jit(lambda e, b: e(b).tokens)(tiny.model.encoder, batch))[0]
    mask = inputs["pixel_attention_mask"][0, :, ::14, ::14].bool()
    for frame, (theirs, size) in enumerate(zip(found.last_hidden_state, mask, strict=True), 1):
        mine = ours[batch.patch_segment_ids[0] == frame]
        h, w = (int(inputs["pixel_attention_mask"][0, frame - 1].any(a).sum()) // 14 for a in (1, 0))
        across = size.shape[1] if size.shape[1] * 14 <= inputs["pixel_values"].shape[-1] else size.shape[1] - 1
        grid = theirs.reshape(-1, across, theirs.shape[-1])[:h, :w].reshape(h * w, -1)
        np.testing.assert_allclose(mine, grid.numpy(), atol=1e-4)
    features = np.asarray(quick.call(VLM.encode, tiny.model, batch).tokens)[0]
    index = batch.vision_index[0]
    np.testing.assert_array_equal(index[index >= 0], np.arange(12))
    np.testing.assert_allclose(features[:12], torch.cat(found.pooler_output).numpy(), atol=1e-4)


def test_golden_features_and_logits():
    folder = GOLDEN / "idefics2_tiny"
    model = hf.load_weights(folder, hf.read_config(folder))
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    batch = lay_out(inputs, model.config)
    features = np.asarray(quick.call(VLM.encode, model, batch).tokens)
    index = batch.vision_index
    found = np.concatenate([features[b][index[b][index[b] >= 0]] for b in range(len(index))])
    np.testing.assert_allclose(found, outputs["image_features"], atol=1e-4)
    logits, real = np.asarray(model(batch)), inputs["attention_mask"] > 0
    np.testing.assert_allclose(logits[real], outputs["logits"][real], atol=1e-4)


def test_golden_greedy_tokens():
    """Each is the most likely after those before it, which is what greedy decoding means.

    One of them is the image placeholder, which nothing keeps a random model from saying: it is a word like any other.
    """
    folder = GOLDEN / "idefics2_tiny"
    model = hf.load_weights(folder, hf.read_config(folder))
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    generated, length = outputs["generated"], inputs["input_ids"].shape[1]
    np.testing.assert_array_equal(generated[:, :length], inputs["input_ids"])
    new = generated.shape[1] - length
    mask = np.pad(inputs["attention_mask"], ((0, 0), (0, new)), constant_values=1)
    batch = lay_out({**inputs, "input_ids": generated, "attention_mask": mask}, model.config)
    batch.vision_index[:, length:] = -1
    logits = np.asarray(model(batch))
    assert new == 12
    np.testing.assert_array_equal(logits[:, length - 1 : -1].argmax(-1), generated[:, length:])


def lay_out(inputs, config):
    """The golden inputs, a sequence each: pictures cut to what their mask says, in patches with their places."""
    tokens, real = inputs["input_ids"].astype(np.int32), inputs["attention_mask"] > 0
    count, p = len(tokens), config.encoder.patch_size
    patches, frames = np.zeros((count, 128, 3 * p * p), np.float32), np.zeros((count, 128), np.int32)
    places = np.zeros((count, 128, 2), np.int32)
    for b in range(count):
        at = frame = 0
        for pixels, mask in zip(inputs["pixel_values"][b], inputs["pixel_attention_mask"][b], strict=True):
            h, w = int(mask[:, 0].sum()) // p, int(mask[0].sum()) // p
            if not pixels.any():
                continue
            frame, n = frame + 1, h * w
            cells = pixels[:, : h * p, : w * p].reshape(3, h, p, w, p).transpose(1, 3, 0, 2, 4)
            patches[b, at : at + n] = cells.reshape(n, -1)
            grids = (table_positions(side, config.encoder.grid) for side in (h, w))
            places[b, at : at + n] = np.stack(np.meshgrid(*grids, indexing="ij"), -1).reshape(n, 2)
            frames[b, at : at + n], at = frame, at + n
    is_image = tokens == config.image_token_id
    return PackedBatch(
        tokens=tokens,
        segment_ids=real.astype(np.int32),
        positions=np.repeat(np.maximum(np.cumsum(real, 1) - 1, 0)[..., None], 3, -1).astype(np.int32),
        loss_weights=np.zeros(tokens.shape, np.float32),
        patches=patches,
        patch_segment_ids=frames,
        patch_window_ids=frames,
        patch_positions=places,
        vision_index=np.where(is_image, np.cumsum(is_image, 1) - 1, -1).astype(np.int32),
    )


def cross_entropy(logits, batch):
    targets, weights = (jnp.roll(jnp.asarray(x), -1, 1) for x in (batch.tokens, batch.loss_weights))
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -(picked * weights).sum()


def test_gradients_of_every_tensor_equal_torch_in_a_packed_sequence(tiny):
    examples = [CASES[n] for n in ("three pictures of different sizes", "text only", "several turns")]
    batch = tiny.processor.pack(examples, **SHAPE)
    assert batch.tokens.shape[0] == 1
    loss, grads = nnx.jit(nnx.value_and_grad(lambda model, b: cross_entropy(model(b), b)))(tiny.model, batch)
    tiny.torch_model.zero_grad()
    total = 0.0
    for number, example in enumerate(examples, 1):
        inputs = hf_inputs(tiny, example)
        weights = torch.from_numpy(batch.loss_weights[0, batch.segment_ids[0] == number])[1:]
        logits = tiny.torch_model(**inputs).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, inputs["input_ids"][0, 1:], reduction="none")
        part = (each * weights).sum()
        part.backward()
        total += float(part.detach())
    assert float(loss) == pytest.approx(total, rel=1e-5)
    flat = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(grads)}
    expected = {n: p.grad.numpy() for n, p in tiny.torch_model.named_parameters()}
    entries = table.entries(tiny.model.config, {p: tuple(v.shape) for p, v in flat.items()})
    assert {e.name for e in entries} == set(expected)
    for entry in entries:
        value = flat[entry.path]
        ours = entry.to_checkpoint(np.asarray(value if entry.layer is None else value[entry.layer]))
        wanted = expected[entry.name]
        error = np.linalg.norm(ours - wanted) / max(np.linalg.norm(wanted), 1e-3)
        assert error < 1e-3, (entry.name, error)


@pytest.fixture(scope="module")
def examples(split):
    names = ("one picture", "text only", "adjacent pictures", "several turns")
    return [split.processor.encode(CASES[n]) for n in names]


def logits_of(model, sequences):
    batch = packing.assemble(sequences, 256, 1024)
    logits = np.asarray(model(batch))
    return [
        logits[b][batch.segment_ids[b] == n]
        for b, sequence in enumerate(sequences)
        for n in range(1, len(sequence) + 1)
    ]


def test_a_conversation_has_the_same_logits_in_any_company(split, examples):
    alone = [logits_of(split.model, [[e], []])[0] for e in examples]
    for order in ((0, 1, 2, 3), (3, 0, 2, 1)):
        sequences = [[examples[i] for i in order[:2]], [examples[i] for i in order[2:]]]
        for index, found in zip(order, logits_of(split.model, sequences), strict=True):
            np.testing.assert_allclose(found, alone[index], atol=1e-5)


def test_changing_the_pictures_of_one_conversation_leaves_the_others_alone(split, examples):
    noise = np.random.default_rng(0).integers(0, 256, examples[2].patches.shape, dtype=np.uint8)
    changed = dataclasses.replace(examples[2], patches=noise)
    before = logits_of(split.model, [[examples[0], examples[2]], [examples[3]]])
    after = logits_of(split.model, [[examples[0], changed], [examples[3]]])
    np.testing.assert_allclose(after[0], before[0], atol=1e-5)
    np.testing.assert_allclose(after[2], before[2], atol=1e-5)
    assert np.abs(after[1] - before[1]).max() > 0.05

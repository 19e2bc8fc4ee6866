"""The model computes what transformers computes, on random small checkpoints in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jvlm.models.vlm import VLM
from jvlm.weights import table
from tests import quick
from tests.support import hf_inputs, hf_positions, new_layout, picture

EXAMPLE = {"seq_len": 256, "max_patches": 640}
VIDEO = {"video_min_pixels": 784, "video_max_pixels": 64 * 784, "fps": 2.0}


def user(text, answer="it is the red circle.", **media):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **media}


def frames(count, width=112, height=84, seed=7):
    return [picture(width, height, seed + i) for i in range(count)]


CASES = {
    "text only": user("what is the answer?"),
    "one window": user("<image>what is it?", images=[picture(112, 112)]),
    "smallest picture": user("<image>what is it?", images=[picture(56, 56)]),
    "edge windows both ways": user("what is in <image> this picture?", images=[picture(252, 140)]),
    "edge windows one way": user("<image>what is it?", images=[picture(112, 196)]),
    "one patch column more than a window": user("<image>what is it?", images=[picture(140, 84)]),
    "resized picture": user("<image>what is it?", images=[picture(333, 187)]),
    "three pictures": user(
        "<image>is the <image>cat in both?<image>", images=[picture(84, 112), picture(140, 56, 1), picture(112, 112, 2)]
    ),
    "adjacent pictures": user("<image><image>which one?", images=[picture(84, 112), picture(168, 84, 1)]),
    "several turns and a system prompt": {
        "messages": [
            {"role": "system", "content": "You are MiMo."},
            {"role": "user", "content": "<image>what is it?"},
            {"role": "assistant", "content": "a dog"},
            {"role": "user", "content": "and <image> this?"},
            {"role": "assistant", "content": "a cat"},
        ],
        "images": [picture(112, 84), picture(84, 140, 3)],
    },
    "video": user("<video>describe this video", videos=[frames(4)], chat_template_kwargs=VIDEO),
    "video with an incomplete pair": user("<video>describe it", videos=[frames(3)], chat_template_kwargs=VIDEO),
    "slow video, then a picture": user(
        "<video>and <image> is?",
        videos=[frames(4, 84, 56)],
        images=[picture(140, 84)],
        chat_template_kwargs={**VIDEO, "fps": 1.0},
    ),
}


def torch_logits(tiny, example, positions=None):
    inputs = hf_inputs(tiny, example)
    if positions is not None:
        inputs["position_ids"] = hf_positions(positions)
    with torch.no_grad():
        return inputs, tiny.torch_model(**inputs).logits.numpy()[0]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(tiny, name):
    example = CASES[name]
    batch = tiny.processor.pack([example], **EXAMPLE)
    n = int(batch.segment_ids.sum())
    # transformers 5.23 places the text after a video elsewhere (docs/mrope.md): give it the ids of 4.49
    inputs, expected = torch_logits(tiny, example, batch.positions[0, :n] if example.get("videos") else None)
    np.testing.assert_array_equal(batch.tokens[0, :n], inputs["input_ids"][0])
    np.testing.assert_allclose(np.asarray(tiny.model(batch))[0, :n], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["text only", "edge windows both ways", "video"])
def test_logits_equal_transformers_with_a_tied_head_and_other_sizes(tiny_tied, name):
    example = CASES[name]
    batch = tiny_tied.processor.pack([example], **EXAMPLE)
    n = int(batch.segment_ids.sum())
    _, expected = torch_logits(tiny_tied, example, batch.positions[0, :n])
    np.testing.assert_allclose(np.asarray(tiny_tied.model(batch))[0, :n], expected, atol=1e-4)


def test_an_example_without_room_for_patches_gives_the_same_text_logits(tiny):
    example = CASES["text only"]
    batch = tiny.processor.pack([example], seq_len=64, max_patches=0)
    _, expected = torch_logits(tiny, example)
    np.testing.assert_allclose(np.asarray(tiny.model(batch))[0, : len(expected)], expected, atol=1e-4)


def test_a_left_padded_batch_of_transformers_equals_our_packed_sequence(tiny):
    examples = [CASES[name] for name in ("text only", "edge windows one way", "three pictures")]
    singles = [hf_inputs(tiny, example) for example in examples]
    longest = max(s["input_ids"].shape[1] for s in singles)

    def left_pad(name, value):
        return torch.cat(
            [torch.nn.functional.pad(s[name], (longest - s[name].shape[1], 0), value=value) for s in singles]
        )

    pixels = [s for s in singles if "pixel_values" in s]
    with torch.no_grad():
        expected = tiny.torch_model(
            input_ids=left_pad("input_ids", 320),
            mm_token_type_ids=left_pad("mm_token_type_ids", 0),
            attention_mask=torch.stack(
                [torch.arange(longest) >= longest - s["input_ids"].shape[1] for s in singles]
            ).long(),
            pixel_values=torch.cat([s["pixel_values"] for s in pixels]),
            image_grid_thw=torch.cat([s["image_grid_thw"] for s in pixels]),
        ).logits.numpy()
    batch = tiny.processor.pack(examples, **EXAMPLE)
    ours = np.asarray(tiny.model(batch))[0]
    for number, single in enumerate(singles, 1):
        n = single["input_ids"].shape[1]
        np.testing.assert_allclose(ours[batch.segment_ids[0] == number], expected[number - 1, -n:], atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_hidden_states_of_the_vision_tower_equal_transformers_after_every_block(tiny, depth):
    example = CASES["three pictures"]
    batch = tiny.processor.pack([example], **EXAMPLE)
    inputs = hf_inputs(tiny, example)
    with torch.no_grad():
        visual = tiny.torch_model.model.visual
        seen = {}
        hook = visual.blocks[depth - 1].register_forward_hook(lambda _, __, out: seen.update(out=out))
        merged = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        hook.remove()
    encoder = nnx.clone(tiny.model.encoder)
    encoder.config = dataclasses.replace(encoder.config, depth=depth, fullatt_block_indexes=(1,) if depth > 1 else ())
    nnx.update(encoder.blocks, jax.tree.map(lambda x: x[:depth], nnx.state(encoder.blocks)))
    ours = np.asarray(nnx.jit(lambda e, b: e(b).tokens)(encoder, batch))[0, : len(inputs["pixel_values"])]
    expected = seen["out"].numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    if depth == tiny.config["vision_config"]["depth"]:
        features = np.asarray(quick.call(VLM.encode, tiny.model, batch).tokens)[0]
        index = batch.vision_index[0]
        np.testing.assert_allclose(features[index[index >= 0]], merged.numpy(), atol=1e-4)


def cross_entropy(logits, batch):
    """Sum of the weighted cross-entropies of all targets of a packed batch."""
    targets = jnp.roll(jnp.asarray(batch.tokens), -1, 1)
    weights = jnp.roll(jnp.asarray(batch.loss_weights), -1, 1)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -(picked * weights).sum()


def test_gradients_of_every_tensor_equal_torch(tiny):
    names = ("text only", "edge windows both ways", "video", "several turns and a system prompt")
    examples = [CASES[name] for name in names]
    batch = tiny.processor.pack(examples, seq_len=448, max_patches=640)
    loss, grads = nnx.jit(nnx.value_and_grad(lambda model, b: cross_entropy(model(b), b)))(tiny.model, batch)

    tiny.torch_model.zero_grad()
    total = 0.0
    for number, example in enumerate(examples, 1):
        inside = batch.segment_ids[0] == number
        inputs = hf_inputs(tiny, example)
        inputs["position_ids"] = hf_positions(batch.positions[0, inside])
        logits = tiny.torch_model(**inputs).logits[0]
        weights = torch.from_numpy(batch.loss_weights[0, inside])[1:]
        each = torch.nn.functional.cross_entropy(logits[:-1], inputs["input_ids"][0, 1:], reduction="none")
        part = (each * weights).sum()
        part.backward()
        total += float(part.detach())
    assert float(loss) == pytest.approx(total, rel=1e-5)

    flat = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(grads)}
    expected = {n: p.grad.numpy() for n, p in tiny.torch_model.named_parameters()}
    entries = table.entries(tiny.model.config, {p: tuple(v.shape) for p, v in flat.items()})
    assert {new_layout(e.name) for e in entries} == set(expected)
    for entry in entries:
        value = flat[entry.path]
        ours = entry.to_checkpoint(np.asarray(value if entry.layer is None else value[entry.layer]))
        wanted = expected[new_layout(entry.name)]
        error = np.linalg.norm(ours - wanted) / max(np.linalg.norm(wanted), 1e-3)
        assert error < 1e-3, (entry.name, error)

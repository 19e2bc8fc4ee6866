"""What shares a sequence, how it is computed and how layers are stored must not change what a conversation gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jvlm_kernels.platforms import compiling_for

from jvlm.data import packing
from jvlm.models import vlm
from tests.support import CLIP_MEAN, CLIP_STD, picture

VIDEO = {"video_min_pixels": 784, "video_max_pixels": 64 * 784}


def turn(text, answer, **media):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **media}


EXAMPLES = [
    turn("<image>what is it?", "a red circle", images=[picture(140, 84)]),
    turn("is there a dog?", "no"),
    turn(
        "<video>and <image>?",
        "a cat runs",
        images=[picture(112, 56, 4)],
        videos=[[picture(84, 84, i) for i in range(4)]],
        chat_template_kwargs=VIDEO,
    ),
    turn("<image><image>both?", "yes", images=[picture(56, 112, 5), picture(168, 112, 6)]),
]
TOKENS, PATCHES = 256, 512


@pytest.fixture(scope="module")
def examples(tiny):
    return [tiny.processor.encode(example) for example in EXAMPLES]


@pytest.fixture(scope="module")
def alone(tiny, examples):
    """Logits of every conversation in a sequence of its own."""
    return [logits_of(tiny.model, [[example]])[0] for example in examples]


def logits_of(model, sequences, tokens=TOKENS, patches=PATCHES, **hints):
    """Logits of each conversation, in the order of the sequences."""
    batch = packing.assemble(sequences, tokens, patches, **hints)
    logits = np.asarray(model(batch))
    return [
        logits[b][batch.segment_ids[b] == n]
        for b, sequence in enumerate(sequences)
        for n in range(1, len(sequence) + 1)
    ]


def with_precision(model, **changes):
    """The same parameters with other settings of `Precision`."""
    config = dataclasses.replace(model.config, precision=dataclasses.replace(model.config.precision, **changes))
    return vlm.bind(vlm.abstract(config), {path: v.get_value() for path, v in vlm.parameters(model).items()})


def one_copy_per_layer(model):
    """The same model with a tuple of per-layer arrays in place of every stacked parameter."""
    graph, state = nnx.split(model)
    flat = [(path, v.replace(tuple(v.get_value())) if "layer" in path else v) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_a_conversation_has_the_same_logits_packed_and_alone(tiny, examples, alone, order):
    # two sequences, so that every order keeps the compiled shape
    sequences = [[examples[i] for i in order[:2]], [examples[i] for i in order[2:]]]
    for index, found in zip(order, logits_of(tiny.model, sequences), strict=True):
        np.testing.assert_allclose(found, alone[index], atol=1e-5)


@pytest.mark.parametrize("hints", [{"max_segment_length": 120}, {"max_image_patches": 128}])
def test_promised_lengths_change_nothing(tiny, examples, alone, hints):
    assert max(e.length for e in examples) <= 120
    sequences = [[examples[0], examples[1]], [examples[2], examples[3]]]
    for expected, found in zip(alone, logits_of(tiny.model, sequences, **hints), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_changing_one_conversation_leaves_the_others_alone(tiny, examples):
    noise = np.random.default_rng(0)
    changed = dataclasses.replace(
        examples[0],
        tokens=np.where(examples[0].vision_index < 0, noise.integers(0, 300, examples[0].length), examples[0].tokens),
        patches=noise.integers(0, 256, examples[0].patches.shape, dtype=np.uint8),
    )
    others = [examples[1], examples[3]]
    before = logits_of(tiny.model, [[others[0], examples[0]], [examples[2], others[1]]])
    after = logits_of(tiny.model, [[others[0], changed], [examples[2], others[1]]])
    for index in (0, 2, 3):
        np.testing.assert_allclose(after[index], before[index], atol=1e-5)
    assert np.abs(after[1] - before[1]).max() > 0.1


def test_a_picture_reaches_the_words_after_it_and_none_before(tiny, examples):
    noise = np.random.default_rng(0)
    changed = dataclasses.replace(
        examples[0], patches=noise.integers(0, 256, examples[0].patches.shape, dtype=np.uint8)
    )
    begin = int(np.flatnonzero(examples[0].vision_index >= 0)[0])
    before, after = (logits_of(tiny.model, [[e], []])[0] for e in (examples[0], changed))
    np.testing.assert_allclose(after[:begin], before[:begin], atol=1e-5)
    assert (np.abs(after[begin:] - before[begin:]).max(-1) > 1e-4).all()


def test_rows_of_nothing_but_padding_give_finite_logits(tiny, examples):
    batch = packing.assemble([[], []], TOKENS, PATCHES, patch_values=1176, position_values=2)
    assert np.isfinite(np.asarray(tiny.model(batch))).all()


def test_bytes_and_normalised_floats_give_the_same_logits(tiny, examples, alone):
    example = examples[0]
    pixels = example.patches.reshape(len(example.patches), 3, -1) / 255.0
    pixels = ((pixels - CLIP_MEAN[:, None]) / CLIP_STD[:, None]).reshape(example.patches.shape).astype(np.float32)
    batch = packing.assemble([[example], []], TOKENS, PATCHES)
    patches = np.zeros(batch.patches.shape, np.float32)
    patches[0, : len(pixels)] = pixels
    found = np.asarray(tiny.model(dataclasses.replace(batch, patches=patches)))[0, : example.length]
    np.testing.assert_allclose(found, alone[0], atol=1e-5)


def test_unstacked_layers_give_the_same_logits(tiny, examples, alone):
    sequences = [[examples[0], examples[1]], [examples[2], examples[3]]]
    for expected, found in zip(alone, logits_of(one_copy_per_layer(tiny.model), sequences), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_reference_attention_gives_the_same_logits(tiny, examples, alone):
    sequences = [[examples[0], examples[1]], [examples[2], examples[3]]]
    model = with_precision(tiny.model, attention="reference")
    for expected, found in zip(alone, logits_of(model, sequences), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_is_no_further_from_float32_than_in_transformers(tiny, examples, alone):
    import torch

    from tests.support import hf_inputs, hf_positions, torch_model

    inputs = hf_inputs(tiny, EXAMPLES[3])
    inputs["position_ids"] = hf_positions(examples[3].positions)
    half = torch_model(tiny.folder).bfloat16()
    with torch.no_grad():
        theirs = half(**inputs).logits.float().numpy()[0]
    logits = with_precision(tiny.model, compute_dtype="bfloat16")(
        packing.assemble([[examples[3]], []], TOKENS, PATCHES)
    )
    assert logits.dtype == jnp.float32
    ours = np.asarray(logits)[0, : examples[3].length]
    assert np.sqrt(np.mean((ours - alone[3]) ** 2)) < 1.2 * np.sqrt(np.mean((theirs - alone[3]) ** 2))


@pytest.fixture(scope="module")
def plain_gradients(tiny, examples):
    return loss_and_gradients(tiny.model, examples)


def packed(examples):
    return packing.assemble([[examples[0], examples[1]]], 128, 64)


def loss(model, batch):
    return -(jax.nn.log_softmax(model(batch))[:, :-1, 5] * batch.loss_weights[:, 1:]).sum()


def loss_and_gradients(model, examples):
    value, grads = nnx.jit(nnx.value_and_grad(loss))(model, packed(examples))
    return float(value), {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(grads)}


@pytest.mark.parametrize("remat", ["full", "dots", "attention"])
def test_recomputation_changes_neither_loss_nor_gradients(tiny, examples, plain_gradients, remat):
    value, grads = loss_and_gradients(with_precision(tiny.model, remat=remat), examples)
    assert value == pytest.approx(plain_gradients[0], rel=1e-6)
    for path, expected in plain_gradients[1].items():
        np.testing.assert_allclose(grads[path], expected, atol=1e-5, rtol=1e-4, err_msg=path)


def test_attention_that_is_kept_is_not_computed_again(tiny, examples):
    def forward_kernels(remat):
        graph, state = nnx.split(with_precision(tiny.model, remat=remat))
        gradient = jax.jit(jax.grad(lambda state, batch: loss(nnx.merge(graph, state), batch)))
        with compiling_for("tpu"):
            text = gradient.trace(state, packed(examples)).lower(lowering_platforms=("tpu",)).as_text()
        return text.count('kernel_name = "segment_attention_forward"')

    # the decoder's, and the tower's of frames and of windows; scans are written once
    assert forward_kernels("none") == forward_kernels("attention") == forward_kernels("dots") == 3
    assert forward_kernels("full") == 6

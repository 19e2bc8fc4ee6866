"""Text that reads vision tokens by gated cross-attention: the plain model at zero gates, and the definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jvlm
from jvlm.data import packing
from jvlm.data.errors import ExampleError
from jvlm.inference.generate import complete, engine_for
from jvlm.inference.sampling import SamplingConfig
from jvlm.models import vlm
from jvlm.models.decoders.cross_attention import CrossAttentionTransformerConfig, VisionMemory, readable_images
from jvlm.weights import hf
from jvlm.weights.table import WeightError
from tests import quick
from tests.idefics2 import CASES, FAKE, IMAGE, LATENTS, write_folder

NAMES = ("three pictures of different sizes", "text only", "several turns")
SHAPE = (192, 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idefics2")
    write_folder(folder, split=False)
    return folder


def sizes(folder, every=2, attends_to="last", least=9):
    """The configuration of the folder's sizes, with cross-attention (0: without)."""
    config = hf.read_config(folder)
    decoder = config.decoder
    if every:
        fields = {"cross_attention_every": every, "attends_to": attends_to}
        decoder = CrossAttentionTransformerConfig.of(decoder, **fields)
    connector = dataclasses.replace(config.connector, min_image_patches=least)
    precision = dataclasses.replace(config.precision, initializer_range=None)
    return dataclasses.replace(config, decoder=decoder, connector=connector, precision=precision)


@functools.cache
def drawn(folder, every):
    """Path -> array of random parameters."""
    config = sizes(folder, every)
    return {path: v.get_value() for path, v in vlm.parameters(quick.random_model(config)).items()}


def build(folder, every=2, attends_to="last", gate=None):
    """(model, processor) of these sizes, the gates as drawn or of one value."""
    config = sizes(folder, every, attends_to)
    values = drawn(folder, every)
    if gate is not None:
        values = values | {path: jnp.full_like(v, gate) for path, v in values.items() if path.endswith("_gate")}
    return vlm.bind(vlm.abstract(config), values), hf.load_processor(folder, config)


def logits_of(model, sequences):
    batch = packing.assemble(sequences, *SHAPE)
    logits = np.asarray(model(batch))
    return [
        logits[b][batch.segment_ids[b] == n]
        for b, sequence in enumerate(sequences)
        for n in range(1, len(sequence) + 1)
    ]


def test_a_picture_is_one_token_between_its_marks(folder):
    processor = hf.load_processor(folder, sizes(folder))
    example = processor.encode(CASES["three pictures of different sizes"])
    ids = [processor.tokenizer.convert_tokens_to_ids(t) for t in (FAKE, IMAGE)]
    at = np.flatnonzero(example.tokens == ids[1])
    assert len(at) == 3
    assert (example.tokens[at - 1] == ids[0]).all()
    assert (example.tokens[at + 1] == ids[0]).all()
    np.testing.assert_array_equal(example.vision_index[at], [0, LATENTS, 2 * LATENTS])
    assert len(example.vision_segment_ids) == 3 * LATENTS


@pytest.mark.parametrize("every", [1, 2])
def test_with_gates_at_zero_it_is_the_plain_language_model(folder, every):
    model, processor = build(folder, every)
    examples = [processor.encode(CASES[n]) for n in NAMES]
    plain, _ = build(folder, 0)
    values = {path: v.get_value() for path, v in vlm.parameters(model).items()}

    def of_layers(path):
        if every == 1 or not path.startswith("decoder.blocks.layer."):
            return values[path]
        pattern = [values[path.replace(".layer.", f".layer.pattern.{i}.")] for i in range(every)]
        return jnp.stack(pattern, 1).reshape(-1, *pattern[0].shape[1:])

    plain = vlm.bind(plain, {path: of_layers(path) for path in vlm.parameters(plain)})
    batch = packing.assemble([examples], *SHAPE)
    without = dataclasses.replace(batch, vision_index=np.full_like(batch.vision_index, -1))
    np.testing.assert_allclose(model(batch), plain(without), atol=1e-5)


@pytest.mark.parametrize("attends_to", ["last", "all"])
def test_tokens_read_the_images_that_the_definition_names(attends_to):
    rng = np.random.default_rng(0)
    segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], 12, axis=1).astype(np.int32)
    image_at = np.zeros(segments.shape, np.int32)
    for sequence in range(2):
        at = np.sort(rng.choice(np.flatnonzero(segments[sequence] > 0), 6, replace=False))
        image_at[sequence, at] = np.arange(1, 7)
    first, last = readable_images(jnp.asarray(image_at), jnp.asarray(segments), attends_to)
    for sequence, place in np.ndindex(segments.shape):
        same = [p for p in range(place + 1) if segments[sequence, p] == segments[sequence, place]]
        own = [image_at[sequence, p] for p in same if image_at[sequence, p]]
        own = own if segments[sequence, place] else []
        wanted = (0, 0) if not own else (own[-1], own[-1]) if attends_to == "last" else (own[0], own[-1])
        assert (int(first[sequence, place]), int(last[sequence, place])) == wanted


@pytest.mark.parametrize("attends_to", ["last", "all"])
def test_the_layer_is_what_the_definition_says_in_float64(folder, attends_to):
    model, _ = build(folder, 1, attends_to, gate=0.7)
    cross = jax.tree.map(lambda x: x[0], nnx.state(model.decoder.blocks.layer.cross))
    layer = nnx.merge(nnx.graphdef(model.decoder.blocks.layer.cross), cross)
    rng = np.random.default_rng(1)
    x, features = (rng.standard_normal((1, n, 64)).astype(np.float32) for n in (10, 12))
    frames = np.repeat([[1, 2, 3, 0]], 3, axis=1).astype(np.int32)
    last = np.asarray([[0, 0, 1, 1, 2, 2, 0, 3, 3, 0]], np.int32)
    first = last if attends_to == "last" else np.where(last == 2, 1, last)
    found, _ = layer(
        jnp.asarray(x), VisionMemory(*map(jnp.asarray, (features, frames, first, last))), None, np.int32(0)
    )

    def norm(v, module):
        v = v.astype(np.float64)
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + module.eps) * np.asarray(module.scale[...])

    def linear(v, module):
        return v @ np.asarray(module.kernel[...], np.float64)

    q = linear(norm(x[0], layer.norm1), layer.attention.q).reshape(10, 4, 16)
    k, v = (
        np.repeat(linear(features[0], part).reshape(12, 2, 16), 2, axis=1)
        for part in (layer.attention.k, layer.attention.v)
    )
    mixed = np.zeros((10, 4, 16))
    for s in range(10):
        seen = (frames[0] >= first[0, s]) & (frames[0] <= last[0, s]) & (frames[0] > 0)
        for h in range(4):
            if seen.any():
                scores = np.exp(k[seen, h] @ q[s, h] / 4)
                mixed[s, h] = scores @ v[seen, h] / scores.sum()
    expected = x[0] + np.tanh(0.7) * linear(mixed.reshape(10, 64), layer.attention.out)
    y = norm(expected, layer.norm2)
    gated = linear(y, layer.mlp.gate)
    expected = expected + np.tanh(0.7) * linear(gated / (1 + np.exp(-gated)) * linear(y, layer.mlp.up), layer.mlp.down)
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


@pytest.mark.parametrize(("every", "attends_to"), [(2, "last"), (1, "all")])
def test_packed_conversations_stay_apart_and_answers_continue_what_a_whole_pass_says(folder, every, attends_to):
    model, processor = build(folder, every, attends_to, gate=0.8)
    prompts = [{**CASES[n], "messages": CASES[n]["messages"][:-1]} for n in NAMES]
    examples = [processor.encode(prompt, generation_prompt=True) for prompt in prompts]
    alone = [logits_of(model, [[e], []])[0] for e in examples]
    for found, expected in zip(logits_of(model, [examples[:2], examples[2:]]), alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    engine = engine_for(model, processor)
    done = complete(engine, examples, SamplingConfig(max_new_tokens=5), request_ids=range(3))
    for example, completion in zip(examples, done, strict=True):
        longer = grown(example, completion.tokens[:-1])
        logits = logits_of(model, [[longer], []])[0][example.length - 1 :]
        logits[:, engine.banned] = -np.inf
        np.testing.assert_array_equal(logits.argmax(-1), completion.tokens)


def grown(example, tokens):
    """The example with tokens of an answer behind it."""
    n = len(tokens)
    positions = np.repeat(np.arange(example.length + n, dtype=np.int32)[:, None], 3, 1)
    values = {"tokens": tokens, "loss_weights": [0.0] * n, "turns": [0] * n, "vision_index": [-1] * n, "media": [0] * n}
    longer = {
        name: np.append(getattr(example, name), v).astype(getattr(example, name).dtype) for name, v in values.items()
    }
    return dataclasses.replace(example, positions=positions, **longer)


def test_a_saved_model_is_the_same_after_loading_and_has_no_hugging_face_form(folder, tmp_path):
    model, processor = build(folder, gate=0.8)
    jvlm.save(model, processor, tmp_path / "saved", format="jvlm")
    loaded, again = jvlm.load(tmp_path / "saved")
    batch = packing.assemble([[processor.encode(CASES[n]) for n in NAMES]], *SHAPE)
    np.testing.assert_array_equal(loaded(batch), model(batch))
    assert again.encode(CASES[NAMES[0]]).tokens.tolist() == processor.encode(CASES[NAMES[0]]).tokens.tolist()
    with pytest.raises(WeightError, match="gated cross-attention have no Hugging Face form"):
        jvlm.save(model, processor, tmp_path / "hf")


@pytest.mark.slow
def test_it_learns_and_the_gates_open(folder):
    model, processor = build(folder, 2)
    batch = packing.assemble([[processor.encode(CASES[n]) for n in NAMES]], *SHAPE)

    def loss(model, batch):
        scores = jax.nn.log_softmax(model(batch))[:, :-1]
        picked = jnp.take_along_axis(scores, jnp.asarray(batch.tokens)[:, 1:, None], -1)[..., 0]
        return -(picked * batch.loss_weights[:, 1:]).sum() / batch.loss_weights.sum()

    @nnx.jit
    def step(model, batch):
        value, grads = nnx.value_and_grad(loss)(model, batch)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.05 * g, nnx.state(model, nnx.Param), grads))
        return value

    values = [float(step(model, batch)) for _ in range(6)]
    assert values[-1] < 0.9 * values[0]
    gates = {p: v.get_value() for p, v in vlm.parameters(model).items() if p.endswith("_gate")}
    assert len(gates) == 2
    assert all((np.abs(v) > 0).all() for v in gates.values())


def test_an_image_smaller_than_sequences_have_room_for_is_refused(folder):
    processor = hf.load_processor(folder, sizes(folder, least=30))
    with pytest.raises(ExampleError, match="an image of 9 patches, less than min_image_patches 30"):
        processor.encode(CASES["a small picture, brought up"])

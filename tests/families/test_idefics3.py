"""Idefics3 and SmolVLM compute what transformers computes, on random small checkpoints in float32."""

import json
import types

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionEmbeddings

import jvlm
from jvlm import families
from jvlm.adapters.attach import attach, extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.peft_write import write_peft
from jvlm.data.content import Conversation, Message, Text, Video
from jvlm.errors import UserError
from jvlm.families.idefics3.image_processor import Idefics3ImageConfig
from jvlm.families.smolvlm.video import SmolVLMSampling, number_in_words
from jvlm.models import vlm
from jvlm.weights import table
from tests.families import oracle
from tests.families.idefics3 import CLASSES, FAKE, GLOBAL, IMAGE, create, image_processor, inputs_of
from tests.families.oracle import user
from tests.support import picture, raw_tensors

SHAPE = {"seq_len": 640, "max_patches": 640}
CASES = {
    "text alone": user("what is the answer?"),
    "an image that is split": user("<image>what is it?", images=[picture(180, 121)]),
    "images of different sizes": user(
        "<image>is the <image>cat in both?<image>", images=[picture(84, 84), picture(300, 56, 1), picture(90, 112, 2)]
    ),
    "images side by side": user("<image><image>which one?", images=[picture(84, 112), picture(168, 84, 1)]),
    "several turns": {
        "messages": [
            {"role": "user", "content": "what is <image>"},
            {"role": "assistant", "content": "a dog"},
            {"role": "user", "content": "<image> and this?"},
            {"role": "assistant", "content": "a cat"},
        ],
        "images": [picture(112, 84), picture(84, 140, 3)],
    },
}
FRAMES = [picture(112, 84, seed) for seed in range(4)]
VIDEOS = {
    "a video": user("<video>describe this video", videos=[FRAMES]),
    "a video behind words": user("where is the cat in <video> ?", videos=[FRAMES[:3]]),
}


@pytest.fixture(scope="module", params=CLASSES)
def tiny(request, tmp_path_factory):
    return create(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    return create(tmp_path_factory.mktemp("smolvlm"), "smolvlm")


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logits_equal_transformers(tiny, name):
    oracle.check_tokens_and_logits(tiny, CASES[name], SHAPE, inputs_of)


@pytest.mark.parametrize("name", VIDEOS)
def test_tokens_and_logits_of_videos_equal_transformers(smolvlm, name):
    oracle.check_tokens_and_logits(smolvlm, VIDEOS[name], SHAPE, inputs_of)


def pixels_of(media, encoder):
    """Normalised pixels [tiles, colours, y, x] of our patches."""
    g, p = encoder.grid, encoder.patch_size
    tiles = media.patches.reshape(-1, g, g, 3, p, p).transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, g * p, g * p)
    return (tiles / 255 - 0.5) / 0.5


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("size", [(180, 121), (33, 500), (60, 60), (59, 61), (640, 480), (7, 5)])
def test_pixels_and_grids_equal_transformers(smolvlm, size, split):
    image, encoder = picture(*size), smolvlm.model.config.encoder
    config = smolvlm.processor.image_config.changed({})
    config = type(config)(**{**vars(config), "split": split})
    media = smolvlm.processor.image_processor.image(image, config)
    options = {"return_row_col_info": True, "do_image_splitting": split, "return_tensors": "np"}
    theirs = image_processor(smolvlm.folder)([[image]], **options)
    side = encoder.grid * encoder.patch_size
    np.testing.assert_allclose(pixels_of(media, encoder), theirs["pixel_values"][0, :, :, :side, :side], atol=1e-6)
    rows, columns = theirs["rows"][0][0], theirs["cols"][0][0]
    expected = [f"<row_{r + 1}_col_{c + 1}>" for r in range(rows) for c in range(columns)]
    written = "".join(piece for piece in media.token_pattern if isinstance(piece, str))
    assert [word for word in expected if word in written] == expected
    assert written.count(FAKE) == rows * columns + 2
    assert written.count("<row_") == rows * columns


def test_features_and_vision_tokens_equal_transformers(smolvlm):
    example = CASES["images of different sizes"]
    batch, inputs = smolvlm.processor.pack([example], **SHAPE), inputs_of(smolvlm, example)
    with torch.no_grad():
        theirs = smolvlm.torch_model.model.get_image_features(inputs["pixel_values"])
    features = np.asarray(nnx.jit(lambda encoder, b: encoder(b).tokens)(smolvlm.model.encoder, batch))[0]
    expected = theirs.last_hidden_state.flatten(0, 1).numpy()
    np.testing.assert_allclose(features[: len(expected)], expected, atol=1e-4)
    tokens = np.asarray(jax.jit(lambda b: smolvlm.model.encode(b).tokens)(batch))[0]
    expected = torch.cat(list(theirs.pooler_output)).numpy()
    np.testing.assert_allclose(tokens[: len(expected)], expected, atol=1e-4)


@pytest.mark.parametrize(("side", "patch"), [(364, 14), (384, 14), (512, 16)])
def test_each_patch_of_a_published_tile_has_the_position_of_its_place(side, patch):
    settings = Idefics3VisionConfig(hidden_size=2, num_attention_heads=1, image_size=side, patch_size=patch)
    embeddings, grid = Idefics3VisionEmbeddings(settings), side // patch
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight[:, 0] = torch.arange(grid * grid)
        found = embeddings(torch.zeros(1, 3, side, side), torch.ones(1, grid, grid, dtype=torch.bool))
    np.testing.assert_array_equal(found[0, :, 0], np.arange(grid * grid))


def test_packed_examples_have_the_logits_that_each_has_alone(smolvlm):
    names = ("images of different sizes", "text alone", "an image that is split")
    oracle.check_packed_equals_alone(smolvlm, [CASES[name] for name in names], SHAPE)


@pytest.mark.slow
def test_gradients_of_every_tensor_equal_torch(smolvlm):
    examples = [CASES["text alone"], CASES["images side by side"], VIDEOS["a video"]]
    oracle.check_gradients(smolvlm, examples, SHAPE, inputs_of)


@pytest.mark.slow
def test_greedy_answers_equal_transformers(tiny):
    videos = VIDEOS if tiny.config["model_type"] == "smolvlm" else {}
    oracle.check_greedy_answers(tiny, [*CASES.values(), *videos.values()], inputs_of)


def test_a_round_trip_is_byte_identical_and_read_by_transformers(tiny, tmp_path):
    jvlm.save(tiny.model, tiny.processor, tmp_path)
    assert raw_tensors(tmp_path) == raw_tensors(tiny.folder)
    kind = tiny.config["model_type"]
    again, report = CLASSES[kind][1].from_pretrained(str(tmp_path), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for (name, value), (_, expected) in zip(again.named_parameters(), tiny.torch_model.named_parameters(), strict=True):
        assert torch.equal(value, expected), name
    form = families.get(kind).hf
    assert form.read_config(json.loads((tmp_path / "config.json").read_text())) == form.read_config(tiny.config)
    for file in ("preprocessor_config.json", "processor_config.json"):
        before, after = (json.loads((folder / file).read_text()) for folder in (tiny.folder, tmp_path))
        assert {**after, **before} == after
    _, processor = jvlm.load(tmp_path)
    assert processor.image_config == tiny.processor.image_config


# Parameters. A public table has those of the 256M; the others are those of transformers' own class, and begin with the
# digits that the models' names and cards give.
COUNTS = {
    "idefics3_8b": 8_460_000_000,
    "smolvlm_256m": 256_484_928,
    "smolvlm_500m": 507_000_000,
    "smolvlm_2_2b": 2_250_000_000,
    "smolvlm2_256m": 256_484_928,
    "smolvlm2_500m": 507_000_000,
    "smolvlm2_2_2b": 2_250_000_000,
}


@pytest.mark.parametrize("name", COUNTS)
def test_names_shapes_and_counts_of_presets_are_the_published_ones(name):
    config = families.preset(name)
    form = families.get(config.family).hf
    values = form.write_config(config)
    assert form.read_config(values) == config
    config_type, model_type = CLASSES[config.family]
    with torch.device("meta"):
        model = model_type(config_type(**values))
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    model = vlm.abstract(config)
    shapes = {path: tuple(v.get_value().shape) for path, v in vlm.parameters(model).items()}
    assert {entry.name: tuple(entry.shape) for entry in table.entries(config, shapes)} == expected
    total, published = sum(vlm.parameter_counts(model).values()), COUNTS[name]
    assert total == published if published % 1000 else abs(total - published) < 0.003 * published


def test_every_preset_is_in_the_table():
    assert {*families.get("idefics3").presets, *families.get("smolvlm").presets} == set(COUNTS)


@pytest.mark.parametrize(
    ("total", "rate"), [(90, 30.0), (300, 29.97), (7, 25.0), (3000, 24.0), (20000, 24.0), (1, 5.0)]
)
def test_the_frames_that_transformers_takes_are_taken(total, rate):
    sampling = SmolVLMSampling(fps=1.0, min_frames=1, max_frames=64, pairs=False)
    found = sampling.by_number(total, rate)
    assert list(found.indices) == reference_frames(total, rate, 64, 1.0)
    assert len(found.indices) / found.fps == pytest.approx(total / rate)


def reference_frames(total, rate, most, fps):
    """The description of transformers' ``SmolVLMVideoProcessor.sample_frames``, which needs torchvision."""
    duration = total / rate
    wanted = max(min(round(fps * duration), most), 1)
    start, end = 0, total - 1
    if duration - 2 > most * fps:
        start, end = int(rate), min(int(total - rate), total - 1)
    return sorted(set(np.linspace(start, end, wanted, dtype=int).tolist()))


def test_a_video_says_its_length_and_the_times_of_its_frames(smolvlm):
    processor = smolvlm.processor
    video = Video(tuple(FRAMES[:2]), fps=0.5, times=(0.0, 62.4))
    example = processor.encode(Conversation((Message("user", (Text("see:"), video)), Message("assistant", "yes"))))
    text = processor.tokenizer.decode(example.tokens)
    once = f"{FAKE}{GLOBAL}{IMAGE * 4}{FAKE}"
    assert (
        "User: see:You are provided the following series of two frames from a 0:00:04 [H:MM:SS] video.\n"
        f"\nFrame from 00:00:{once}\nFrame from 01:02:{once}\n\n<end_of_utterance>"
    ) in text


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "one"),
        (16, "sixteen"),
        (40, "forty"),
        (64, "sixty-four"),
        (105, "one hundred and five"),
        (300, "three hundred"),
    ],
)
def test_numbers_are_written_as_num2words_writes_them(number, words):
    assert number_in_words(number) == words


def test_tiles_that_the_encoder_cannot_take_are_refused(smolvlm):
    with pytest.raises(
        UserError, match="tiles of 90 pixels hold 6 patches of 14 along a side, and the encoder takes 4"
    ):
        Idefics3ImageConfig(tile=90).build(types.SimpleNamespace(**vars(smolvlm.model.config)))


def test_adapters_on_every_tower_have_the_names_of_peft(smolvlm, tmp_path):
    model = attach(smolvlm.model, AdapterConfig(rank=2, targets=("encoder", "connector", "decoder")))
    write_peft(extract(model), model.config, tmp_path, base_name="org/base")
    modules = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for name in raw_tensors(tmp_path)
        if name.endswith("lora_A.weight")
    }
    linear = {n for n, module in smolvlm.torch_model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert modules == linear - {"lm_head"}

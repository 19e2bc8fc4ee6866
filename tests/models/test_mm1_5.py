"""MM1.5 as a whole, at toy size: trained, saved, loaded, packed, asked; dense and with experts."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import jvlm
from jvlm import configs, job
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.families.mm1_5.presets import PRESETS
from jvlm.models import vlm
from jvlm.models.connectors.perceiver import PerceiverConfig
from jvlm.models.connectors.pooled_mlp import PooledMLPConfig
from jvlm.models.decoders.cross_attention import CrossAttentionTransformerConfig
from jvlm.models.decoders.moe import MoEConfig
from jvlm.training import runs, starting_model
from jvlm.weights.positions import resize_positions, with_grid
from jvlm.weights.table import WeightError
from jvlm.weights.upcycling import upcycle
from tests import quick
from tests.support import picture
from tests.training import support

STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the toy config on examples of none, one and two pictures: (result, folder of the examples)."""
    folder = tmp_path_factory.mktemp("mm1_5")
    examples = support.write_examples(folder, 24)
    return runs.train(experiment(folder, examples)), folder


def experiment(folder, examples, *overrides):
    fields = {
        "--output_root": str(folder),
        "--name": "run",
        "--data.train": str(examples),
        "--data.batch_size": "2",
        "--data.seq_len": "256",
        "--steps": str(STEPS),
        "--log_interval_steps": "1",
        "--checkpoint.save_interval_steps": "100",
    }
    return configs.load("mm1_5/easy_vqa", [*(v for pair in fields.items() for v in pair), *overrides])


def ask(images, text="what color?", answer="red"):
    tags = "<image>" * len(images)
    return {
        "messages": [{"role": "user", "content": f"{tags}{text}"}, {"role": "assistant", "content": answer}],
        "images": images,
    }


CHATS = [
    ask([picture(40, 50, 1)]),
    ask([picture(64, 50, 2), picture(30, 30, 3)], answer="blue and green"),
    ask([]),
    ask([picture(20, 20, i) for i in range(3)]),
    {
        "messages": [{"role": "user", "content": "<video>what?"}, {"role": "assistant", "content": "no"}],
        "videos": [[picture(30, 40, i) for i in range(9)]],
    },
]


def test_a_run_learns_in_one_compilation_and_logs_what_the_router_does(run):
    result, folder = run
    lines = [json.loads(line) for line in (folder / "run" / "logging.jsonl").read_text().splitlines()]
    assert [line["step_number"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert result.compilations == 1
    config = result.model.config.decoder.mlp
    for line in lines:
        assert line["router/dropped"] == 0
        assert 0 < line["router/entropy"] <= 1
        assert line["router/load_min"] <= 1 <= line["router/load_max"] <= config.experts / config.top_k
        parts = config.balance_weight * line["router/balance"] + config.z_weight * line["router/z"]
        assert line["aux_loss"] == pytest.approx(parts, rel=1e-5)


def test_conversations_of_an_example_do_not_see_one_another(run):
    model, processor = run[0].model, run[0].processor
    packed = processor.pack(CHATS)
    assert packed.tokens.shape[0] == 1
    logits = np.asarray(model(packed))[0]
    for number, chat in enumerate(CHATS, 1):
        alone = processor.pack([chat], seq_len=packed.tokens.shape[1], max_patches=packed.patches.shape[1])
        found = np.asarray(model(alone))[0, alone.segment_ids[0] == 1]
        np.testing.assert_allclose(found, logits[packed.segment_ids[0] == number], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "connector",
    [
        PooledMLPConfig(grid=4, out_grid=3),
        PerceiverConfig(projection_size=48, latents=5, depth=1, num_heads=2, num_kv_heads=1, head_dim=16),
    ],
    ids=["pooling", "perceiver"],
)
def test_other_connectors_take_its_place(run, connector):
    """Each conversation's logits are those it has alone, and its picture's features reach them."""
    trained, tokenizer = run[0].model.config, run[0].processor.tokenizer
    config = dataclasses.replace(trained, connector=connector)
    processor = Processor(tokenizer, config, run[0].processor.config)
    model = starting_model.random_model(config, 0, None)
    batch = processor.pack(CHATS)
    assert int((batch.vision_index >= 0).sum()) == (5 + 10 + 3 + 4) * connector.tokens_per_image
    logits = np.asarray(model(batch))[0]
    dark = dataclasses.replace(batch, patches=np.where(batch.patch_segment_ids[..., None] > 5, 0, batch.patches))
    changed = np.abs(np.asarray(model(dark))[0] - logits).max(-1) > 1e-5
    assert {int(n) for n in batch.segment_ids[0][changed]} == {2, 4, 5}  # the third has no picture, the first kept its


def test_tiles_and_frames_become_the_right_number_of_tokens(run):
    processor = run[0].processor
    examples = [processor.encode(chat) for chat in CHATS]
    # 5 frames of 4 features for each of up to two pictures, one frame for each of three, 4 frames of the video
    assert [int((e.vision_index >= 0).sum()) for e in examples] == [20, 40, 0, 12, 16]
    text = processor.tokenizer.decode(examples[1].tokens)
    assert all(text.count(f"({k},{i},{j})") == 1 for k in (0, 1) for i, j in ((0, 0), (1, 1), (1, 2), (2, 1), (2, 2)))


@pytest.mark.slow
def test_a_run_folder_and_a_saved_model_answer_as_the_model_does(run, tmp_path):
    result, folder = run
    settings = {"max_new_tokens": 6}
    expected = jvlm.generate(result.model, result.processor, CHATS, **settings)
    assert len(expected) == len(CHATS)
    assert any(expected)
    model, processor = jvlm.load(folder / "run")
    jvlm.save(model, processor, tmp_path / "saved", format="jvlm")
    again, processor = jvlm.load(tmp_path / "saved")
    assert again.config == result.model.config
    assert processor.config == result.processor.config
    for path, variable in vlm.parameters(again).items():
        np.testing.assert_array_equal(variable.get_value(), vlm.parameters(result.model)[path].get_value(), path)
    assert jvlm.generate(again, processor, CHATS, **settings) == expected


def test_there_is_no_export_and_the_error_says_so(run, tmp_path):
    result, folder = run
    with pytest.raises(WeightError, match=r"'mm1_5' have no Hugging Face form.*format='jvlm'"):
        jvlm.save(result.model, result.processor, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    wanted = experiment(folder, folder / "examples.jsonl", "--name", "other", "--export.enabled", "True")
    with pytest.raises(WeightError, match="no Hugging Face form"):
        job.run(wanted)
    assert not (folder / "other").exists()
    with pytest.raises(WeightError, match="holds a run already"):
        jvlm.save(result.model, result.processor, folder / "run", format="jvlm")


@pytest.fixture(scope="module")
def dense(run):
    """A dense model of four layers, random."""
    config = run[0].model.config
    decoder = dataclasses.replace(config.decoder, mlp=None, num_layers=4)
    return quick.random_model(dataclasses.replace(config, decoder=decoder))


def test_an_upcycled_model_computes_what_the_dense_one_did(run, dense):
    batch = run[0].processor.pack(CHATS[:1])
    experts = MoEConfig(every=2, experts=3, top_k=2, intermediate_size=dense.config.decoder.intermediate_size)
    sparse = upcycle(dense, experts)
    counts = [vlm.parameter_counts(m)["decoder"] for m in (dense, sparse)]
    D, F = dense.config.decoder.hidden_size, experts.intermediate_size
    assert counts[1] - counts[0] == 2 * (2 * 3 * D * F + 3 * D)
    found, expected = (np.asarray(m(batch))[batch.segment_ids > 0] for m in (sparse, dense))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    aux = quick.call(lambda model, batch: model.hidden(batch).aux, sparse, batch)
    assert aux["loss"].shape == (2,)
    assert np.ptp(np.asarray(aux["router/entropy"])) > 0  # each layer has a router of its own
    with pytest.raises(UserError, match="intermediate_size 7 must be that of the dense MLPs, 128"):
        upcycle(dense, MoEConfig(intermediate_size=7))
    with pytest.raises(UserError, match="MoEConfig in place of MLPs already"):
        upcycle(sparse, experts)


def test_each_layer_keeps_its_own_parameters_whatever_else_alternates(run):
    """Cross-attention before every second layer, experts in every third: layers lie in groups of two, then of six."""
    config = run[0].model.config
    dense = dataclasses.replace(config.decoder, mlp=None, num_layers=12)
    decoder = CrossAttentionTransformerConfig.of(dense, cross_attention_every=2)
    template = vlm.abstract(dataclasses.replace(config, decoder=decoder))
    shapes = {path: v.get_value().shape for path, v in vlm.parameters(template).items()}
    rng = np.random.default_rng(0)
    dense = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    experts = MoEConfig(every=3, experts=2, intermediate_size=decoder.intermediate_size)
    sparse = {p: v.get_value() for p, v in vlm.parameters(upcycle(vlm.bind(template, dense), experts)).items()}
    at = "decoder.blocks.layer.pattern"
    for layer in range(12):
        old, new = ((f"{at}.{layer % period}", layer // period) for period in (2, 6))
        before = dense[f"{old[0]}.attention.q.kernel"][old[1]]
        np.testing.assert_array_equal(sparse[f"{new[0]}.attention.q.kernel"][new[1]], before)
        up = dense[f"{old[0]}.mlp.up.kernel"][old[1]]
        if (layer + 1) % 3:
            np.testing.assert_array_equal(sparse[f"{new[0]}.mlp.up.kernel"][new[1]], up)
        else:
            np.testing.assert_array_equal(sparse[f"{new[0]}.mlp.up"][new[1]], np.stack([up, up]))


def test_a_model_goes_on_with_larger_tiles_and_experts(run, dense, tmp_path):
    result, folder = run
    larger = with_grid(dense, 6)
    tables = {"encoder.positions": True, "connector.positions": False}
    for path, variable in vlm.parameters(larger).items():
        old = np.asarray(vlm.parameters(dense)[path].get_value())
        expected = resize_positions(old, 6, class_token=tables[path]) if path in tables else old
        np.testing.assert_array_equal(variable.get_value(), expected, path)
    jvlm.save(dense, result.processor, tmp_path / "dense", format="jvlm")
    config = experiment(folder, folder / "examples.jsonl", "--init_from", str(tmp_path / "dense"), "--adapt.grid", "6")
    experts = MoEConfig(experts=3, intermediate_size=128)
    config = dataclasses.replace(config, model=None, adapt=dataclasses.replace(config.adapt, experts=experts))
    model, processor = starting_model.start_model(config)
    assert (model.config.encoder.grid, model.config.connector.grid, model.config.decoder.mlp) == (6, 6, experts)
    assert processor.encode(CHATS[0]).num_patches == 5 * 37


# Encoder and dense decoder by arithmetic from the sizes; the tower is the published 632 M.
@pytest.mark.parametrize("name", PRESETS)
def test_preset_parameter_counts(name):
    config = PRESETS[name]
    counts = vlm.parameter_counts(vlm.abstract(config))
    vit, llm = config.encoder, config.decoder
    d, f = vit.hidden_size, vit.intermediate_size
    block = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
    assert counts["encoder"] == vit.depth * block + 588 * d + d + (48 * 48 + 1) * d + 2 * d
    assert round(counts["encoder"] / 1e6) == 633
    D, F = llm.hidden_size, llm.intermediate_size
    kv = D // llm.num_heads * llm.num_kv_heads
    attention, mlp = 2 * D * D + 2 * D * kv, 3 * D * F
    mixed = 0 if llm.mlp is None else llm.num_layers // llm.mlp.every
    experts = 0 if llm.mlp is None else 64 * mlp + 64 * D
    tables = llm.vocab_size * D * (1 if llm.tie_word_embeddings else 2)
    layers = llm.num_layers * (attention + 2 * D) + (llm.num_layers - mixed) * mlp + mixed * experts
    assert counts["decoder"] == layers + tables + D
    size = {"1b": 1.3, "3b": 3.3, "7b": 8.2, "30b": 29.2}[name.split("_")[2]]
    if llm.mlp is None:
        assert counts["decoder"] / 1e9 == pytest.approx(size, abs=0.05)


def test_parameters_of_experts_name_their_axes(run):
    axes = {
        path.removeprefix("decoder.blocks.layer.pattern.1."): variable.get_metadata()["axes"]
        for path, variable in vlm.parameters(run[0].model).items()
        if ".pattern.1.mlp." in path
    }
    assert axes == {
        "mlp.router": ("embed", "experts"),
        "mlp.gate": ("experts", "embed", "mlp"),
        "mlp.up": ("experts", "embed", "mlp"),
        "mlp.down": ("experts", "mlp", "embed"),
    }
    assert jax.tree.leaves(nnx.state(run[0].model))

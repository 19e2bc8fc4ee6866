"""Training Idefics2: one compilation whatever the pictures, a loss that falls, an export that answers the same."""

import dataclasses

import numpy as np
import pytest

import jvlm
from jvlm import config as config_tree
from jvlm import configs
from jvlm.models import vlm
from jvlm.training import runs
from tests.idefics2 import write_folder
from tests.training import support

STEPS = 8


def experiment(folder, start, examples, *overrides):
    fields = {
        "--init_from": str(start),
        "--output_root": str(folder),
        "--name": "run",
        "--data.train": str(examples),
        "--data.batch_size": "2",
        "--data.seq_len": "256",
        "--data.max_patches": "256",
        "--data.max_image_patches": "64",
        "--data.pack_window": "6",
        "--data.read_threads": "1",
        "--processor.image.longest_edge": "112",
        "--processor.image.shortest_edge": "28",
        "--optimizer.learning_rate": "3e-3",
        "--optimizer.decoder_lr": "3e-3",
        "--gradient_accumulation_steps": "1",
        "--steps": str(STEPS),
        "--log_interval_steps": "1",
    }
    return configs.load("idefics2/sft", [*(v for pair in fields.items() for v in pair), *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the config on examples of none, one and two pictures, split: (result, folder)."""
    folder = tmp_path_factory.mktemp("idefics2")
    write_folder(folder / "start", split=True)
    return runs.train(experiment(folder, folder / "start", support.write_examples(folder / "data", 24))), folder


def test_mixed_counts_of_pictures_need_one_compilation_and_the_loss_falls(run):
    result, folder = run
    assert result.compilations == 1
    assert result.processor.image_config.split
    losses = list(support.losses(folder).values())
    assert len(losses) == STEPS
    assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])


@pytest.mark.slow
def test_the_frozen_tower_keeps_every_bit_and_the_export_answers_the_same(run, tmp_path):
    result, folder = run
    before, _ = jvlm.load(folder / "start")
    np.testing.assert_array_equal(before.encoder.positions[...], result.model.encoder.positions[...])
    assert not np.array_equal(before.connector.latents[...], result.model.connector.latents[...])
    jvlm.save(result.model, result.processor, tmp_path / "hf", format="hf")
    model, processor = jvlm.load(tmp_path / "hf")
    assert processor.image_config == result.processor.image_config
    example = {
        "messages": [{"role": "user", "content": "<image>what color?"}],
        "images": [str(folder / "data" / "1_0.png")],
    }
    answers = [
        jvlm.generate(m, p, [example], max_new_tokens=8)
        for m, p in ((result.model, result.processor), (model, processor))
    ]
    assert answers[0] == answers[1]


def test_the_papers_two_architectures_are_configs_that_differ_in_the_decoder():
    wanted = configs.load("idefics2/pretrain_cross_attention", ["--model.decoder.cross_attention_every", "8"]).model
    plain = configs.load("idefics2/pretrain", []).model
    assert wanted.decoder.cross_attention_every == 8
    assert dataclasses.replace(wanted, decoder=plain.decoder) == plain
    assert (plain.placeholders_per_image, wanted.placeholders_per_image) == (64, 1)
    counts = [vlm.parameter_counts(vlm.abstract(model))["decoder"] for model in (plain, wanted)]
    assert counts[1] > counts[0]
    back = config_tree.from_dict(type(wanted), config_tree.to_dict(wanted))
    assert back == wanted

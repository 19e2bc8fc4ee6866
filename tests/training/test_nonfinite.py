"""Steps that are not finite: skipped without a trace, and after some in a row dumped with the guilty conversation."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest

from jvlm import cli
from jvlm.data import pipeline
from jvlm.models import vlm
from jvlm.training import nonfinite, optimizer, runs, starting_model, train_step, trainer
from jvlm.training.state import TrainState
from jvlm.training.supervised import SupervisedTask
from tests.training import support


def _with_heavy_example(examples, folder, *numbers):
    """The examples, the given ones (from 0) with a loss weight too large for the loss and its gradient in float32."""
    lines = [json.loads(line) for line in examples.read_text().splitlines()]
    for line in lines:
        line["images"] = [str(examples.parent / name) for name in line["images"]]
    for number in numbers:
        lines[number]["messages"][3]["loss_scale"] = 3e38
    path = folder / "heavy.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return support.write_examples(tmp_path_factory.mktemp("examples"), 12)


def _one_to_an_example(folder, path, *options):
    """Without shuffling and a window of one: example n of the file is batch n."""
    plain = ("--data.shuffle", "none", "--data.pack_window", "1", "--data.batch_size", "1")
    return support.experiment(folder, path, *plain, *options)


def _bytes(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_skipped_step_leaves_parameters_and_optimizer_bit_equal_and_the_next_one_learns(tmp_path, examples):
    experiment = _one_to_an_example(tmp_path, _with_heavy_example(examples, tmp_path, 1))
    model, processor = starting_model.start_model(experiment)
    template, values = trainer.split(model)
    tx = optimizer.make(experiment.optimizer, experiment.steps, vlm.parameters(template))
    step = train_step.TrainStep(template, SupervisedTask(), tx)
    state = TrainState(jax.numpy.zeros((), int), values, jax.jit(tx.init)(values))
    batches = iter(pipeline.training_data(processor, experiment.data, seed=0)[0])
    seen = []
    for _ in range(3):
        before = _bytes((state.trainable, state.opt_state))
        state, metrics = step(state, train_step.stack([next(batches).batch]))
        seen.append((float(metrics["skipped"]), before == _bytes((state.trainable, state.opt_state))))
    assert seen == [(0.0, False), (1.0, True), (0.0, False)]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
    # Muon's, AdamW's, and one of the schedule for all towers
    assert [int(c) for c in jax.tree.leaves(state.opt_state) if c.dtype == np.int32] == [2] * 3


def test_one_bad_step_is_counted_and_the_run_goes_on_but_two_in_a_row_stop_it(tmp_path, examples, capsys):
    heavy = _with_heavy_example(examples, tmp_path, 1, 4, 5)
    options = ("--stop_after_skips", "2", "--steps", "8", "--checkpoint.save_interval_steps", "3")
    with pytest.raises(nonfinite.Diverged, match=r"2 steps in a row.*\n?.*jvlm replay") as stopped:
        runs.train(_one_to_an_example(tmp_path, heavy, *options))
    dumped = tmp_path / "run" / "nonfinite" / "5-6"
    assert str(dumped) in str(stopped.value)
    lines = [json.loads(line) for line in (tmp_path / "run" / "logging.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1, 2]
    assert [line["loss"] is None for line in lines] == [False, True, False, False, True]

    batches = nonfinite.read(dumped)
    assert [d.step for d in batches] == [5, 6]
    assert [o.number for d in batches for sequence in d.origins for o in sequence] == [5, 6]
    assert all((d.batch.loss_weights > 1e38).any() for d in batches)
    capsys.readouterr()
    assert cli.main(["replay", str(dumped)]) == 0
    said = capsys.readouterr().out
    assert "parameters    encoder finite, connector finite, decoder finite" in said
    assert "heavy.jsonl, line 5: loss" in said
    assert "heavy.jsonl, line 6: loss" in said
    assert said.count("1 of 1 conversations are not finite") == 2
    assert re.search("outputs +encoder finite, connector finite, decoder finite", said)
    assert re.search("gradients .* decoder [0-9]+ NOT FINITE; first: ", said)


def test_among_the_conversations_of_a_batch_replay_names_only_the_guilty_one(tmp_path, examples, capsys):
    heavy = _with_heavy_example(examples, tmp_path, 7)
    options = ("--stop_after_skips", "1", "--data.pack_window", "12")
    with pytest.raises(nonfinite.Diverged, match="1 steps in a row") as stopped:
        runs.train(_one_to_an_example(tmp_path, heavy, *options))
    assert cli.main(["replay", str(stopped.value).rpartition(" ")[2]]) == 0
    named = [line for line in capsys.readouterr().out.splitlines() if "heavy.jsonl, line" in line]
    assert len(named) == 1
    assert "line 8: loss" in named[0]


def test_replaying_a_folder_without_batches_says_so(tmp_path, capsys):
    assert cli.main(["replay", str(tmp_path)]) == 2
    assert "holds no batches" in capsys.readouterr().err

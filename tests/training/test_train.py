"""The training job as a whole: resuming, freezing, accumulation, counting."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jvlm.data import pipeline
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.training import optimizer, runs, starting_model, train_step, trainer
from jvlm.training.config import OptimizerConfig, Stage
from jvlm.training.interruption import EXIT_STATUS, StopRequests
from jvlm.training.state import TrainState
from jvlm.training.supervised import SupervisedTask, supervised_loss
from tests import quick
from tests.training import support

OPTIONS = ("--steps", "14", "--export.enabled", "False")
CONFIG = """
from pathlib import Path
from tests.training import support
def get_config():
    return support.experiment(Path({folder!r}), Path({examples!r}), *{options!r})
"""


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return support.write_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, examples):
    """A run of fourteen steps: (its experiment, its result)."""
    experiment = support.experiment(tmp_path_factory.mktemp("finished"), examples, *OPTIONS)
    return experiment, runs.train(experiment)


def _values(model):
    return {path: np.asarray(v.get_value()) for path, v in vlm.parameters(model).items()}


@pytest.mark.parametrize(
    ("sent", "after", "status"),
    [(signal.SIGKILL, 4, -signal.SIGKILL), pytest.param(signal.SIGTERM, 8, EXIT_STATUS, marks=pytest.mark.slow)],
)
def test_losses_after_being_killed_or_asked_to_stop_are_bit_equal_to_an_unbroken_run(
    tmp_path, examples, finished, sent, after, status
):
    run = tmp_path / "run"
    process = subprocess.Popen(
        _command(tmp_path, examples), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_env()
    )
    deadline = time.monotonic() + 120
    while len(_lines(run)) < after:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(sent)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == status
    stopped_at = len(_lines(run))
    assert after <= stopped_at < 14
    if sent == signal.SIGTERM:
        assert f"stopped by SIGTERM after step {stopped_at} of 14, which is saved in" in said
        assert max(int(p.name) for p in (run / "checkpoints").iterdir()) == stopped_at
    runs.train(support.experiment(tmp_path, examples, *OPTIONS))  # goes on in this process
    assert support.losses(tmp_path) == support.losses(Path(finished[0].output_root))
    assert list(support.losses(tmp_path)) == list(range(1, 15))
    shares = [json.loads(line)["goodput"] for line in _lines(run)]
    assert all(0 <= share <= 1 for share in shares)
    if sent == signal.SIGTERM:
        assert shares[stopped_at] < shares[stopped_at - 1], "the time of a restart is not useful"


def _command(folder, examples):
    config = folder / "config.py"
    config.write_text(CONFIG.format(folder=str(folder), examples=str(examples), options=OPTIONS))
    return [sys.executable, "-m", "jvlm.cli", "train", str(config)]


def _env():
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def _lines(run):
    path = run / "logging.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def test_a_first_ctrl_c_asks_to_stop_after_the_step_and_a_second_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    requests = StopRequests()
    requests.on_train_start(None)
    try:
        assert requests.after(1) is None
        signal.raise_signal(signal.SIGINT)
        assert requests.after(2) == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        requests.on_stop(None, None)
    assert signal.getsignal(signal.SIGINT) is before


def test_one_compilation_serves_examples_of_text_of_one_image_and_of_two(finished):
    _, result = finished
    assert result.compilations == 1
    assert result.steps == 14


@pytest.mark.parametrize("tower", ["encoder", pytest.param("decoder", marks=pytest.mark.slow)])
def test_a_tower_at_learning_rate_0_stays_bit_equal_and_the_others_move(tmp_path, examples, tower, capsys):
    experiment = support.experiment(tmp_path, examples, f"--optimizer.{tower}_lr", "0", "--steps", "2")
    before = _values(starting_model.start_model(experiment)[0])
    after = _values(runs.train(experiment).model)
    for path, value in before.items():
        frozen = path.startswith(f"{tower}.")
        assert np.array_equal(value, after[path]) == frozen, path
    table = capsys.readouterr().out
    (line,) = [text for text in table.splitlines() if text.startswith(tower)]
    assert line.split()[2:] == ["0", "frozen"]


def test_a_stage_goes_on_from_the_one_before_it_and_a_restart_repeats_nothing(tmp_path, examples, capsys):
    data = support.experiment(tmp_path, examples).data
    stage = Stage(
        "warm-up", dataclasses.replace(data, batch_size=1), OptimizerConfig(kind="muon", encoder_lr=0.0), steps=3
    )
    experiment = support.experiment(tmp_path, examples, "--steps", "2", "--optimizer.kind", "muon", stages=(stage,))
    result = runs.train(experiment)
    assert (result.steps, result.compilations) == (5, 2)
    assert "stage 1 of 2: run/stages/warm-up" in capsys.readouterr().out
    first, second = runs.runs_of(experiment)
    begun, learnt = _values(starting_model.start_model(first)[0]), _values(starting_model.start_model(second)[0])
    changed = {path.partition(".")[0] for path in begun if not np.array_equal(begun[path], learnt[path])}
    assert changed == {"connector", "decoder"}
    again = runs.train(experiment)
    assert again.compilations == 0
    assert all(np.array_equal(x, y) for x, y in zip(*(_values(r.model).values() for r in (result, again)), strict=True))


@pytest.mark.parametrize("names", [("a", "a"), ("a b",), ("..",)])
def test_stages_need_names_that_can_be_folders(tmp_path, examples, names):
    data = support.experiment(tmp_path, examples).data
    with pytest.raises(UserError, match="stages need names"):
        support.experiment(tmp_path, examples, stages=tuple(Stage(name, data) for name in names))


def test_every_parameter_changes_when_nothing_is_frozen(finished):
    experiment, result = finished
    before = _values(starting_model.start_model(experiment)[0])
    after = _values(result.model)
    assert [p for p in before if np.array_equal(before[p], after[p])] == []


def test_accumulated_gradients_equal_those_of_one_large_batch(tmp_path, examples):
    experiment = support.experiment(tmp_path, examples, "--optimizer.max_grad_norm", "1e9")
    model, processor = starting_model.start_model(experiment)
    template, values = trainer.split(model)
    data = dataclasses.replace(experiment.data, batch_size=4)
    large = next(iter(pipeline.training_data(processor, data, seed=0)[0])).batch
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 2], large) for i in (0, 2)]
    tx = optimizer.make(experiment.optimizer, 10, vlm.parameters(template))
    step = train_step.TrainStep(template, SupervisedTask(), tx)

    def run(batches):
        copies = {path: value.copy() for path, value in values.items()}
        state = TrainState(jax.numpy.zeros((), int), copies, jax.jit(tx.init)(copies))
        return step(state, train_step.stack(batches))[1]

    one, two = run([large]), run(halves)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=2e-5, err_msg=name)


def test_loss_does_not_depend_on_the_chunk_of_logits(tmp_path, examples):
    experiment = support.experiment(tmp_path, examples)
    model, processor = starting_model.start_model(experiment)
    batch = next(iter(pipeline.training_data(processor, experiment.data, seed=0)[0])).batch
    whole, parts = (
        quick.call(lambda model, batch, block=block: supervised_loss(model, batch, block=block), model, batch)
        for block in (None, 37)
    )
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    logits = np.asarray(model(batch), np.float64)[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, batch.tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(whole.total, -(chosen * batch.loss_weights[:, 1:]).sum(), rtol=1e-5)


def test_another_experiment_in_the_same_folder_is_refused_naming_the_fields(finished):
    experiment, _ = finished
    other = dataclasses.replace(experiment.optimizer, learning_rate=0.5)
    with pytest.raises(UserError, match=r"another experiment(.|\n)*optimizer.learning_rate: 0.\d+ -> 0.5"):
        runs.train(dataclasses.replace(experiment, optimizer=other))


def test_examples_left_out_are_counted_and_listed_with_their_reason(tmp_path, examples):
    long = {"messages": [{"role": "user", "content": "is there " * 400}, {"role": "assistant", "content": "no"}]}
    bad = tmp_path / "examples.jsonl"
    lines = [json.loads(line) for line in examples.read_text().splitlines() if '"images": []' in line]
    lines[0]["image_s"] = []  # a column that is not known is carried along
    bad_box = {**lines[1], "objects": {"ref": [], "bbox": [[1, 2, 3]]}}
    bad.write_text("".join(json.dumps(r) + "\n" for r in [*lines, long, bad_box]) + "{not json\n")
    options = ("--data.on_bad_example", "skip", "--data.max_patches", "0", "--data.max_bad_fraction", "1")
    result = runs.train(support.experiment(tmp_path, bad, *options, "--steps", "4"))
    listed = [json.loads(line) for line in (result.folder / "rejected.jsonl").read_text().splitlines()]
    assert result.rejected == len(listed) > 0
    found = {line["number"] - len(lines): line for line in listed}
    assert "do not fit" in found[1]["reason"]
    assert found.keys() == {1, 2, 3}
    assert found[2]["field"] == "objects.bbox[0]"
    assert "not JSON" in found[3]["reason"]


def test_a_bad_example_stops_the_run_by_default_and_is_named(tmp_path, examples):
    bad = tmp_path / "examples.jsonl"
    bad.write_text(
        '{"messages": [{"role": "user", "content": "<image>hi"}, {"role": "assistant", "content": "yes"}]}\n'
    )
    with pytest.raises(UserError, match=r"examples.jsonl, line 1, field 'images': 1 <image> tags but 0 entries"):
        runs.train(support.experiment(tmp_path, bad))


def test_the_log_line_has_what_ms_swift_users_know_and_where_the_time_goes(finished):
    _, result = finished
    line = json.loads((result.folder / "logging.jsonl").read_text().splitlines()[-1])
    expected = "loss grad_norm learning_rate token_acc global_step/max_steps elapsed_time remaining_time memory(GiB) "
    expected += "train_speed(s/it) data_wait "
    expected += "padding_text padding_patches tokens_per_s tflops_per_s skipped"
    assert set(expected.split()) <= set(line)
    assert line["global_step/max_steps"] == "14/14"
    assert list((result.folder / "tensorboard").iterdir())

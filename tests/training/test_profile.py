"""Profiles: a trace of the steps asked for, and names that say which part of the model an operation belongs to."""

from __future__ import annotations

import gzip
import json
import re

import jax
import pytest

from jvlm.data import pipeline
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.training import optimizer, runs, starting_model, train_step, trainer
from jvlm.training.state import TrainState
from jvlm.training.supervised import SupervisedTask
from tests.training import support


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return support.write_examples(tmp_path_factory.mktemp("examples"), 6)


@pytest.mark.slow
def test_a_trace_of_the_steps_asked_for_lies_in_the_run_folder(tmp_path, examples):
    result = runs.train(support.experiment(tmp_path, examples, "--profile", "2:3", "--steps", "8"))
    (space,) = (result.folder / "profile").rglob("*.xplane.pb")
    assert space.stat().st_size > 1000
    (trace,) = (result.folder / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "train"] == ["2", "3"]


def test_the_compiled_step_names_every_part_forwards_and_backwards(tmp_path, examples):
    experiment = support.experiment(tmp_path, examples)
    model, processor = starting_model.start_model(experiment)
    template, values = trainer.split(model)
    tx = optimizer.make(experiment.optimizer, experiment.steps, vlm.parameters(template))
    step = train_step.TrainStep(template, SupervisedTask(), tx)
    batch = next(iter(pipeline.training_data(processor, experiment.data, seed=0)[0])).batch
    state = TrainState(jax.numpy.zeros((), int), values, jax.jit(tx.init)(values))
    text = step.lower(state, train_step.stack([batch])).compile().as_text()
    names = set(re.findall(r'op_name="([^"]+)"', text))
    for parts in (
        *(("encoder", part) for part in ("attention", "mlp", "norm")),
        *(("decoder", part) for part in ("attention", "mlp", "norm")),
        ("connector",),
    ):
        for way in ("jvp", "transpose"):
            pattern = f"{way}.*" + r".*/".join(parts)
            assert any(re.search(pattern, name) for name in names), f"no operation is named {parts} in the {way}"
    assert any("loss" in name for name in names)
    assert any("update" in name for name in names)


@pytest.mark.parametrize("text", ["10", "3:2", "0:4", "a:b"])
def test_a_wrong_range_of_steps_is_refused(tmp_path, examples, text):
    with pytest.raises(UserError, match="profile is FIRST:LAST"):
        support.experiment(tmp_path, examples, profile=text)

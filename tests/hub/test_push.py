"""Uploads of runs: what arrives loads again, and a hub that is down costs the upload and nothing else."""

import dataclasses
import types

import numpy as np
import pytest
import yaml

import jvlm
from jvlm import job
from jvlm.errors import UserError
from jvlm.hub.errors import HubUnavailable
from jvlm.models import vlm
from jvlm.training import push
from jvlm.training.config import CheckpointConfig, Experiment, PushConfig
from tests.training import support


@pytest.fixture(scope="module")
def loaded(tiny):
    return jvlm.load(tiny.folder)


def _experiment(**changes) -> Experiment:
    return Experiment("run", init_from="hf://org/base@" + "0a" * 20, push=PushConfig("me/tuned", **changes))


@pytest.fixture
def base(logged_in, tiny, monkeypatch):
    """The base on the hub, with a license."""
    files = {path.name: path.read_bytes() for path in tiny.folder.iterdir() if path.is_file()}
    repo = logged_in.add("org/base", {**files, "README.md": b"---\nlicense: apache-2.0\n---\n"})
    return dataclasses.replace(_experiment(), init_from=f"hf://org/base@{repo.refs['main']}")


def values(model):
    return {path: np.asarray(variable.get_value()) for path, variable in vlm.parameters(model).items()}


def test_the_result_of_a_run_loads_by_its_id_with_the_same_parameters(logged_in, base, loaded, tmp_path):
    model, processor = loaded
    data = dataclasses.replace(base.data, train=("org/set:docs#5", "examples.jsonl"))
    experiment = dataclasses.replace(base, data=data)
    push.push_result(experiment, model, processor, tmp_path / "run", {"accuracy": 0.75})
    again, _ = jvlm.load("me/tuned")
    before = values(model)
    for path, value in values(again).items():
        np.testing.assert_array_equal(value, before[path])
    repo = logged_in.repos["models", "me/tuned"]
    files = repo.commits[repo.refs["main"]]
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert front["base_model"] == "org/base"
    assert front["license"] == "apache-2.0"
    assert front["datasets"] == ["org/set"]
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.75}]
    assert not list((tmp_path / "run").iterdir())


def test_a_checkpoint_that_does_not_arrive_is_noted_and_the_next_one_is_sent(logged_in, base, loaded, tmp_path, capsys):
    model, processor = loaded
    logged_in.fail = {("POST", "/commit/"): [503] * 5}
    every_third = dataclasses.replace(base, checkpoint=CheckpointConfig(save_interval_steps=3))
    hook = push.PushCheckpoints(every_third, processor, tmp_path)
    trainer = types.SimpleNamespace(step=1, template=model, evaluated_params=dict)
    trainer.save_requested, trainer.stop_reason, trainer.steps = False, None, 9
    trainer.state = types.SimpleNamespace(params=values(model))
    hook.on_save(trainer)  # Orbax saves the first step of a run, which nobody asked for
    trainer.step = 3
    hook.on_save(trainer)
    trainer.step = 6
    hook.on_save(trainer)
    hook.on_stop(trainer, None)
    assert len(hook.failures) == 1
    assert hook.failures[0].startswith("step 3: ")
    assert "upload of step 3 FAILED" in capsys.readouterr().err
    assert len(logged_in.repos["models", "me/tuned"].commits) == 2  # the empty one, and that of step 6
    assert not list((tmp_path / "push").iterdir())


def test_a_result_that_does_not_arrive_is_an_outage(logged_in, base, loaded, tmp_path):
    logged_in.fail = {("POST", "/commit/"): [503] * 5}
    with pytest.raises(HubUnavailable, match="me/tuned was not sent"):
        push.push_result(base, *loaded, tmp_path, None)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (PushConfig("tuned"), "not the id of a repository"),
        (PushConfig("me/tuned", every="best"), "needs a validation"),
    ],
)
def test_what_would_fail_after_hours_is_refused_at_the_start(config, problem):
    with pytest.raises(UserError, match=problem):
        push.check(dataclasses.replace(_experiment(), push=config))


@pytest.mark.slow
def test_a_run_ends_well_without_the_hub_and_says_at_the_end_what_did_not_arrive(logged_in, tmp_path, capsys):
    examples = support.write_examples(tmp_path / "data", 6)
    options = ("--steps", "4", "--push.hub_model_id", "me/run", "--push.every", "all")
    experiment = support.experiment(tmp_path, examples, *options)
    logged_in.fail = {("POST", "/api/repos/create"): [503] * 5}
    with pytest.raises(UserError, match=r"(?s)the model is trained.*1 checkpoints were not uploaded.*step \d"):
        job.run(experiment)
    assert len(support.losses(tmp_path)) == 4
    assert (tmp_path / "run/hf/model.safetensors").is_file()
    assert (tmp_path / "run/report.html").is_file()
    job.run(experiment)  # the same command does the rest again
    model, _ = jvlm.load("me/run")
    np.testing.assert_equal(values(model), values(jvlm.load(tmp_path / "run/hf")[0]))

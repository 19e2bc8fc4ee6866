"""A run keeps the commits that it began with."""

import dataclasses
import json

import pytest

from jvlm.hub import downloads
from jvlm.training import hub_pins, runs
from tests.training import support


@pytest.fixture
def begun(hub, tmp_path):
    """An experiment whose tokenizer and data are ids."""
    examples = support.write_examples(tmp_path / "data", 6)
    experiment = support.experiment(tmp_path, examples, "--steps", "2")
    files = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    hub.add("org/data", files, "datasets")
    tokenizer = {p.name: p.read_bytes() for p in downloads.Path(experiment.tokenizer).iterdir() if p.is_file()}
    hub.add("org/tokenizer", tokenizer)
    data = dataclasses.replace(experiment.data, train=("org/data#4", str(examples)))
    return dataclasses.replace(experiment, tokenizer="org/tokenizer", data=data)


def forget():
    downloads._commits.clear()
    downloads._folders.clear()


def test_ids_are_pinned_and_a_restart_takes_the_same_commits(hub, begun, tmp_path):
    pinned, pins = hub_pins.pin(begun)
    data, model = (hub.repos[key] for key in (("datasets", "org/data"), ("models", "org/tokenizer")))
    assert pinned.tokenizer == f"hf://org/tokenizer@{model.refs['main']}"
    assert pinned.data.train == (f"hf://org/data@{data.refs['main']}#4", begun.data.train[1])
    hub_pins.write(tmp_path / "run", pins)
    data.commit({"examples.jsonl": b"{}\n"})
    model.commit({"tokenizer.json": b"{}"})
    forget()
    assert hub_pins.pin(begun) == (pinned, pins)
    assert hub_pins.pin(pinned)[0] == pinned
    elsewhere, _ = hub_pins.pin(dataclasses.replace(begun, name="other"))
    assert elsewhere.tokenizer == f"hf://org/tokenizer@{model.refs['main']}" != pinned.tokenizer


def test_an_experiment_of_folders_asks_nothing(hub, begun, tmp_path):
    examples = str(tmp_path / "data/examples.jsonl")
    data = dataclasses.replace(begun.data, train=(examples, f"{examples}#3"))
    local = dataclasses.replace(begun, tokenizer=str(tmp_path / "data"), data=data)
    assert hub_pins.pin(local) == (local, {})
    assert not hub.requests


@pytest.mark.slow
def test_a_run_from_ids_goes_on_offline_with_what_it_began_with(hub, begun, tmp_path, monkeypatch):
    runs.train(begun)
    saved = json.loads((tmp_path / "run/hub.json").read_text())
    assert set(saved) == {"org/tokenizer", "org/data#4"}
    hub.repos["datasets", "org/data"].commit({"examples.jsonl": b"{}\n"})
    forget()
    hub.requests.clear()
    assert runs.train(dataclasses.replace(begun, accept_changes=True, steps=3)).last == 3
    assert not hub.requests

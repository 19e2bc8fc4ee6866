"""A run in an object store: Google Cloud Storage's interface, on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import jvlm
from jvlm.data import stores
from jvlm.models import vlm
from jvlm.training import runs
from jvlm.training.run_storage import RunStorage
from jvlm.weights import run_dir
from tests.training import support

RUN = "runs/run/"


@pytest.fixture
def store(tmp_path, monkeypatch, bucket):
    """The files of the run in the bucket; this machine is an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return bucket.objects


def _values(model):
    return {path: np.asarray(variable.get_value()) for path, variable in vlm.parameters(model).items()}


def _steps(store):
    words = (name.removeprefix(RUN).split("/") for name in store if name.endswith("/params/manifest.ocdbt"))
    return sorted(word[1] for word in words if word[0] == "checkpoints" and len(word) == 4)


@pytest.mark.slow
def test_a_run_in_a_store_goes_on_from_there_on_another_machine_and_past_a_damaged_step(store, tmp_path, capsys):
    examples = support.write_examples(tmp_path / "examples", 6)
    remote = (
        "--output_root",
        "gs://bucket/runs",
        "--checkpoint.save_interval_steps",
        "2",
        "--checkpoint.max_to_keep",
        "9",
    )
    result = runs.train(support.experiment(tmp_path, examples, *remote, "--steps", "6"))
    assert result.folder == RunStorage("gs://bucket/runs", "run").folder
    assert _steps(store) == list("1246")
    assert not (result.folder / "checkpoints").exists()
    for name in ("experiment.json", "logging.jsonl", "clock.json", "processor/tokenizer.json"):
        assert store[RUN + name][1] == (result.folder / name).read_bytes()
    values = _values(result.model)
    for place in (result.folder, "gs://bucket/runs/run"):
        loaded = _values(jvlm.load(place)[0])
        assert all(np.array_equal(values[path], loaded[path]) for path in values)
    assert not list(Path("copies").rglob("checkpoints"))
    arrays = run_dir.Arrays(run_dir.params_folder(result.folder), {path: v.shape for path, v in values.items()})
    assert all(np.array_equal(values[path], arrays.read(path)) for path in values)

    # the machine is lost; of one checkpoint a file is cut short, of another the end was not written
    losses = [json.loads(line)["loss"] for line in store[RUN + "logging.jsonl"][1].splitlines()]
    shutil.rmtree(result.folder)
    data = max((n for n in store if n.startswith(RUN + "checkpoints/4/params/")), key=lambda n: len(store[n][1]))
    store[data] = (store[data][0], store[data][1][: len(store[data][1]) // 2])
    stores.at(f"gs://bucket/{RUN}checkpoints/6/commit_success.txt").unlink()
    assert run_dir.steps(run_dir.local("gs://bucket/runs/run")) == [1, 2, 4]
    capsys.readouterr()
    again = runs.train(support.experiment(tmp_path, examples, *remote, "--steps", "6"))
    said = capsys.readouterr().out
    assert "removing gs://bucket/runs/run/checkpoints/6" in said
    assert "CHECKPOINT DAMAGED, put aside in gs://bucket/runs/run/damaged/4: step 4" in said
    assert {name for name in store if name.startswith(RUN + "damaged/")} > {RUN + "damaged/4.txt"}
    assert [json.loads(line)["loss"] for line in (again.folder / "logging.jsonl").read_text().splitlines()] == losses
    assert all(np.array_equal(values[p], v) for p, v in _values(again.model).items())


def test_only_what_changed_is_copied_again(store):
    home = RunStorage("gs://bucket/runs", "run")
    home.pull()
    (home.folder / "a.txt").write_text("1")
    home.push()
    first = store[RUN + "a.txt"]
    home.push()
    assert store[RUN + "a.txt"] is first
    (home.folder / "a.txt").write_text("22")
    home.push()
    assert store[RUN + "a.txt"][1] == b"22"
    assert RUN + "checkpoints.at" not in store


@pytest.mark.slow
def test_a_run_whose_base_is_a_run_in_a_store_refers_to_it_there(store, tmp_path):
    examples = support.write_examples(tmp_path / "examples", 6)
    base = runs.train(support.experiment(tmp_path, examples, "--output_root", "gs://bucket/runs", "--steps", "1"))
    shutil.rmtree(base.folder)
    frozen_towers = ("--optimizer.encoder_lr", "0", "--optimizer.decoder_lr", "0", "--steps", "2")
    options = ("--init_from", "gs://bucket/runs/run", "--name", "second", *frozen_towers)
    result = runs.train(support.experiment(tmp_path, examples, *options))
    record = json.loads((result.folder / "frozen.json").read_text())
    assert (record["base"], record["step"]) == ("gs://bucket/runs/run", 1)
    stored = run_dir.stored_paths(run_dir.params_folder(result.folder))
    assert {path.partition(".")[0] for path in stored} == {"connector"}
    first, values = _values(base.model), _values(result.model)
    frozen = {path for path in values if np.array_equal(values[path], first[path])}
    assert frozen == {path for path in values if not path.startswith("connector.")}
    loaded = _values(jvlm.load(result.folder)[0])
    assert all(np.array_equal(values[path], loaded[path]) for path in values)
    again = _values(runs.train(support.experiment(tmp_path, examples, *options)).model)
    assert all(np.array_equal(values[path], again[path]) for path in values)

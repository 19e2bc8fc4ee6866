"""A run in an object store: a local folder stands in for it, under a scheme of its own."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from etils import epath

import jvlm
from jvlm.models import vlm
from jvlm.training import loop
from jvlm.training.home import Home
from tests.training import support

STORE = {}


@epath.register_path_cls("store://")
class _Store(type(epath.Path("/"))):
    """store://bucket/... is a folder on disk, which is all that paths, Orbax and tensorstore see of it."""

    def __new__(cls, path: str):
        return epath.Path(STORE["folder"] / path.removeprefix("store://"))


@pytest.fixture
def store(tmp_path, monkeypatch):
    STORE["folder"] = tmp_path / "store"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return STORE["folder"] / "bucket" / "runs" / "run"


def test_a_run_in_a_store_goes_on_from_there_on_another_machine(store, tmp_path):
    rows = support.write_rows(tmp_path / "rows", 6)
    remote = ("--output_root", "store://bucket/runs", "--checkpoint.every", "2")
    result = loop.train(support.experiment(tmp_path, rows, *remote, "--steps", "8", "--checkpoint.keep", "9"))
    assert result.folder == Home("store://bucket/runs", "run").folder
    assert {p.name for p in (store / "checkpoints").iterdir() if p.name.isdigit()} == set("12468")
    assert not (result.folder / "checkpoints").exists()
    for name in ("experiment.json", "logging.jsonl", "clock.json", "processor/tokenizer.json"):
        assert (store / name).read_bytes() == (result.folder / name).read_bytes()
    loaded, _ = jvlm.load(result.folder)
    values = {p: np.asarray(v.get_value()) for p, v in vlm.parameters(result.model).items()}
    assert all(np.array_equal(values[p], v.get_value()) for p, v in vlm.parameters(loaded).items())

    # the machine is lost, and with it two checkpoints
    losses = [json.loads(line)["loss"] for line in (store / "logging.jsonl").read_text().splitlines()]
    shutil.rmtree(result.folder)
    for step in ("6", "8"):
        shutil.rmtree(store / "checkpoints" / step)
    again = loop.train(support.experiment(tmp_path, rows, *remote, "--steps", "8", "--checkpoint.keep", "9"))
    assert [json.loads(line)["loss"] for line in (again.folder / "logging.jsonl").read_text().splitlines()] == losses
    assert all(np.array_equal(values[p], v.get_value()) for p, v in vlm.parameters(again.model).items())


def test_only_what_changed_is_copied_again(store):
    home = Home("store://bucket/runs", "run")
    home.pull()
    (home.folder / "a.txt").write_text("1")
    home.push()
    (store / "a.txt").write_text("left alone")
    home.push()
    assert (store / "a.txt").read_text() == "left alone"
    (home.folder / "a.txt").write_text("22")
    home.push()
    assert (store / "a.txt").read_text() == "22"
    assert not (store / "checkpoints.at").exists()

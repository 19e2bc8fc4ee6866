"""Frozen parameters are not in checkpoints: a run refers to the folder they come from, or stores them once."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import jvlm
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.training import runs
from jvlm.weights import convert, frozen, run_dir
from tests.training import support

FROZEN = ("--optimizer.encoder_lr", "0", "--optimizer.decoder_lr", "0", "--steps", "2")


def _values(model):
    return {path: np.asarray(v.get_value()) for path, v in vlm.parameters(model).items()}


def _same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that began at random with two towers frozen, a folder of its model, and a run that began from that."""
    folder = tmp_path_factory.mktemp("frozen")
    examples = support.write_examples(folder / "data", 6)
    first = runs.train(support.experiment(folder, examples, *FROZEN))
    jvlm.save(first.model, first.processor, folder / "base")
    options = ("--name", "second", "--init_from", str(folder / "base"), *FROZEN)
    second = runs.train(support.experiment(folder, examples, *options))
    return folder, examples, {"run": _values(first.model), "second": _values(second.model)}


def test_frozen_parameters_that_come_from_no_folder_are_stored_once(begun):
    folder, examples, values = begun
    for step in run_dir.steps(folder / "run"):
        stored = run_dir.stored_paths(run_dir.params_folder(folder / "run", step))
        assert {path.partition(".")[0] for path in stored} == {"connector"}
    assert frozen.read(folder / "run").base is None
    assert run_dir.stored_paths(run_dir.params_folder(folder / "run").parents[2] / "frozen" / "params")
    assert _same(_values(jvlm.load(folder / "run")[0]), values["run"])
    # a restart has them from there, not from its own random numbers
    assert _same(_values(runs.train(support.experiment(folder, examples, *FROZEN)).model), values["run"])
    (folder / "run" / "frozen.json").rename(folder / "aside.json")
    with pytest.raises(UserError, match=r"frozen.json is missing, or of another run: .* fingerprint [0-9a-f]{16}, and"):
        runs.train(support.experiment(folder, examples, *FROZEN))
    (folder / "aside.json").rename(folder / "run" / "frozen.json")


def test_frozen_parameters_of_a_folder_are_referred_to_and_loading_and_converting_find_them(begun, tmp_path):
    folder, _, values = begun
    record = frozen.read(folder / "second")
    assert record.base == str(folder / "base")
    assert not (folder / "second" / "frozen").exists()
    size = sum(p.stat().st_size for p in (folder / "second" / "checkpoints" / "2" / "params").rglob("*") if p.is_file())
    assert size < sum(v.nbytes for v in values["second"].values()) / 3
    assert _same(_values(jvlm.load(folder / "second")[0]), values["second"])
    for name in ("run", "second"):
        convert.convert(folder / name, tmp_path / name)
        assert _same(_values(jvlm.load(tmp_path / name)[0]), values[name])


def test_a_base_that_is_gone_is_named_with_the_way_out_and_one_that_changed_with_both_fingerprints(begun, tmp_path):
    folder, examples, values = begun
    shutil.copytree(folder / "second", tmp_path / "second")
    shutil.copytree(folder / "base", tmp_path / "moved")
    record = tmp_path / "second" / "frozen.json"
    saved = json.loads(record.read_text())
    record.write_text(json.dumps({**saved, "base": str(tmp_path / "nowhere")}))
    with pytest.raises(UserError, match=rf'(?s)parameters from {tmp_path}/nowhere.*Put that folder.*as "base" into'):
        jvlm.load(tmp_path / "second")
    record.write_text(json.dumps({**saved, "base": str(tmp_path / "moved")}))
    assert _same(_values(jvlm.load(tmp_path / "second")[0]), values["second"])

    shutil.rmtree(tmp_path / "moved")
    model, processor = jvlm.load(folder / "base")
    weights = vlm.parameters(model)["encoder.patch_embed.kernel"]
    weights.set_value(weights.get_value() + 1)
    jvlm.save(model, processor, tmp_path / "moved")
    with pytest.raises(UserError, match=rf"which have changed: fingerprint {saved['digest']} when.*, [0-9a-f]+ now"):
        jvlm.load(tmp_path / "second")
    options = ("--name", "second", "--init_from", str(tmp_path / "moved"), *FROZEN, "--accept_changes", "true")
    with pytest.raises(UserError, match=rf"which have changed: fingerprint {saved['digest']} when.*, [0-9a-f]+ now"):
        runs.train(support.experiment(tmp_path, examples, *options))


def test_a_record_of_an_earlier_version_is_compared_and_kept_when_the_base_has_moved(begun, tmp_path, monkeypatch):
    folder, examples, values = begun
    shutil.copytree(folder / "base", tmp_path / "base")
    options = ("--name", "second", "--init_from", str(tmp_path / "base"), *FROZEN)
    with monkeypatch.context() as earlier:
        earlier.setattr("jvlm.training.frozen_parameters.NEWEST", 1)
        runs.train(support.experiment(tmp_path, examples, *options))
    old = frozen.read(tmp_path / "second")
    assert all(number < 2**32 for number in old.fingerprints.values())
    assert _same(_values(jvlm.load(tmp_path / "second")[0]), values["second"])
    (tmp_path / "base").rename(tmp_path / "moved")
    moved = [str(tmp_path / "moved") if word == str(tmp_path / "base") else word for word in options]
    runs.train(support.experiment(tmp_path, examples, *moved, "--accept_changes", "true"))
    new = frozen.read(tmp_path / "second")
    assert new.base != old.base
    assert new.digest == old.digest
    for _ in range(2):  # the checkpoints name that digest
        runs.train(support.experiment(tmp_path, examples, *moved, "--accept_changes", "true"))
    convert.convert(tmp_path / "second", tmp_path / "hf")
    assert _same(_values(jvlm.load(tmp_path / "hf")[0]), values["second"])


def test_on_request_every_checkpoint_holds_everything(begun, tmp_path):
    folder, examples, _ = begun
    options = ("--init_from", str(folder / "base"), "--checkpoint.full", "True", *FROZEN)
    result = runs.train(support.experiment(tmp_path, examples, *options))
    assert not (result.folder / "frozen.json").exists()
    assert run_dir.stored_paths(run_dir.params_folder(result.folder)) == set(vlm.parameters(result.model))
    assert _same(_values(jvlm.load(result.folder)[0]), _values(result.model))

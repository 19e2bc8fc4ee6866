"""A restart goes on with the same run only: its data, its start and its settings; half written files are mended."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from jvlm import config as config_tree
from jvlm.data.errors import Rejected
from jvlm.data.packing import PackedSequences
from jvlm.errors import UserError
from jvlm.training import resolve, resume, runs, starting_model
from jvlm.training.data_counters import DataCounters
from jvlm.training.side_files import read_lines, write_json
from tests.training import support


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, with bad examples among its data that are left out, and its data."""
    folder = tmp_path_factory.mktemp("resume")
    examples = support.write_examples(folder / "data", 6)
    with open(examples, "a") as file:
        file.write("not json\n")
    shutil.copytree(support.experiment(folder, examples).tokenizer, folder / "tokenizer")
    runs.train(_experiment(folder))
    return folder


OPTIONS = "--steps 2 --data.on_bad_example skip --data.max_bad_fraction 1".split()


def _experiment(folder, *more):
    options = (*OPTIONS, "--tokenizer", str(folder / "tokenizer"), *more)
    return support.experiment(folder, folder / "data" / "examples.jsonl", *options)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run in a place of its own."""
    for name in ("data", "tokenizer", "run"):
        shutil.copytree(finished / name, tmp_path / name)
    saved = (tmp_path / "run" / "experiment.json").read_text().replace(str(finished), str(tmp_path))
    (tmp_path / "run" / "experiment.json").write_text(saved)
    inputs = (tmp_path / "run" / "inputs.json").read_text().replace(str(finished), str(tmp_path))
    (tmp_path / "run" / "inputs.json").write_text(inputs)
    return tmp_path


def _append(folder):
    with open(folder / "data" / "examples.jsonl", "a") as file:
        file.write(
            json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]})
        )


def _replace_a_letter(folder):
    path = folder / "data" / "examples.jsonl"
    path.write_text(path.read_text().replace("color", "colon", 1))


def _other_tokenizer(folder):
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))


CHANGES = {
    "an example more": (_append, ["data"], r"data.*examples.jsonl.examples: 7 -> 8"),
    "a letter of an example": (_replace_a_letter, [], r"data.*examples.jsonl.sha256: '\w+' -> '\w+'"),
    "another tokenizer": (_other_tokenizer, [], r"start.tokenizer.(bytes|sha256): .* -> "),
    "a setting": (lambda folder: None, ["--optimizer.weight_decay", "0.3"], r"optimizer.weight_decay: 0.05 -> 0.3"),
}


@pytest.mark.parametrize(
    "name",
    [
        name if "a letter" in name or name == "a setting" else pytest.param(name, marks=pytest.mark.slow)
        for name in CHANGES
    ],
)
def test_a_change_is_refused_with_both_values_and_accepted_when_asked_to(run, name, capsys):
    change, options, said = CHANGES[name]
    options = [option for option in options if option != "data"]
    change(run)
    before = (run / "run" / "inputs.json").read_text()
    with pytest.raises(UserError, match=rf"(?s)accept_changes true.*{said}"):
        runs.train(_experiment(run, *options))
    assert (run / "run" / "inputs.json").read_text() == before
    runs.train(_experiment(run, *options, "--accept_changes", "true"))
    assert "changed since the run began, and accepted" in capsys.readouterr().out
    (noted,) = read_lines(run / "run" / "changes.jsonl")
    assert any(part in line for line in noted["changes"] for part in ("examples", "sha256", "weight_decay"))
    # from now on the changed run is the run
    runs.train(_experiment(run, *options))


@pytest.mark.parametrize(
    "options", [("--optimizer.encoder_lr", "0"), ("--model.decoder.intermediate_size", "64")], ids=["frozen", "shape"]
)
def test_what_a_checkpoint_cannot_take_is_refused_even_when_accepted(run, options):
    with pytest.raises(UserError, match=r"another experiment(?s:.)*Differences"):
        runs.train(_experiment(run, *options, "--accept_changes", "true"))
    assert sorted(p.name for p in (run / "run" / "checkpoints").iterdir()), "no checkpoint is put aside"


def test_an_unchanged_run_goes_on_whatever_is_free_to_change(run):
    runs.train(_experiment(run, "--checkpoint.max_to_keep", "5", "--data.max_too_long_fraction", "0.5"))
    assert not (run / "run" / "changes.jsonl").exists()


def test_the_model_that_a_run_begins_from_is_part_of_it(run):
    source = run / "run"
    experiment = _experiment(run, "--name", "second", "--init_from", str(source))
    first = resume.inputs(experiment)["start"]["init_from"]
    assert first["step"] == 2
    # the files of the last checkpoint count, and nothing that a restart of the first run writes anew
    (source / "logging.jsonl").write_text("")
    assert resume.inputs(experiment)["start"]["init_from"] == first
    data = next(p for p in sorted((source / "checkpoints/2/data").rglob("*")) if p.is_file() and p.stat().st_size > 99)
    damaged = bytearray(data.read_bytes())
    damaged[50] ^= 1
    data.write_bytes(damaged)
    assert resume.inputs(experiment)["start"]["init_from"] != first


@pytest.mark.parametrize("damage", ["half a line", "not utf-8", "zeros"])
def test_half_written_lines_are_mended_at_the_restart(run, damage):
    tail = {"half a line": b'{"file": "examples.js', "not utf-8": b'{"file": "\xff\xfe', "zeros": b"\0" * 50}[damage]
    whole = {}
    for path in (run / "run" / "rejected.jsonl", run / "run" / "logging.jsonl"):
        whole[path] = path.read_text()
        assert whole[path]
        path.write_bytes(whole[path].encode() + tail)
    runs.train(_experiment(run))
    for path, text in whole.items():
        assert path.read_text() == text, path


@pytest.mark.parametrize("file", ["experiment.json", "inputs.json", "clock.json"])
def test_a_damaged_file_of_the_run_is_named(run, file):
    path = run / "run" / file
    path.write_text(path.read_text()[:9])
    with pytest.raises(UserError, match=rf"{file} is damaged"):
        runs.train(_experiment(run))


def test_examples_are_counted_in_each_epoch_and_listed_once(tmp_path):
    config = dataclasses.replace(support.experiment(tmp_path, support.write_examples(tmp_path, 1)).data)
    seen = DataCounters(tmp_path, 40, config, counts=True)
    left = tuple(Rejected("examples.jsonl", n, "messages", "too long", "too_long") for n in range(36))
    for step in range(1, 4):  # three passes over 40 examples
        seen.add(PackedSequences(None, 4, left), step)
    totals = seen.totals()
    assert (totals.read, totals.too_long, totals.dropped, totals.epoch) == (120, 108, 0.9, 3.0)
    assert seen.rejected() == 36 == len(read_lines(tmp_path / "rejected.jsonl"))
    assert "36 examples left out" in seen.summary(seen.rejected())
    with pytest.raises(UserError, match=r"108 of 120 examples read did not fit(.|\n)*max_too_long_fraction = 0.25"):
        seen.check(totals)
    again = DataCounters(tmp_path, 40, config, counts=True)
    again.restore(json.loads(json.dumps(seen.state())), 2)
    again.add(PackedSequences(None, 4, left), 4)
    assert again.rejected() == 36 == len(read_lines(tmp_path / "rejected.jsonl"))
    assert again.totals().epoch == 4.0
    # other data: the passes made stay, the counts begin anew
    other = DataCounters(tmp_path, 20, config, counts=True)
    other.restore(again.state(), 4)
    other.add(PackedSequences(None, 10, ()), 5)
    assert (other.totals().epoch, other.totals().read) == (4.5, 10)


@pytest.mark.parametrize(("budget", "seen"), [(2_000, (0, 9_999, 2_500)), (500, (0, 9_999, 2_500)), (100, (0, 9_999))])
def test_large_files_are_fingerprinted_by_their_size_and_by_pieces(tmp_path, monkeypatch, budget, seen):
    monkeypatch.setattr(resume, "_PIECE", 100)
    monkeypatch.setattr(resume, "_PIECES", 5)
    path = tmp_path / "large"
    values = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8)
    path.write_bytes(values.tobytes())
    first = resume._fingerprint([path], budget)
    for place in seen:
        changed = values.copy()
        changed[place] ^= 1
        path.write_bytes(changed.tobytes())
        assert resume._fingerprint([path], budget) != first
    path.write_bytes(values.tobytes() + b"x")
    assert resume._fingerprint([path], budget)["bytes"] == 10_001


def test_a_restart_keeps_the_example_sizes_and_the_steps_that_were_chosen_from_the_data(tmp_path):
    examples = support.write_examples(tmp_path / "data", 12)
    experiment = support.experiment(tmp_path, examples, "--data.seq_len", "auto", "--data.max_patches", "auto")
    experiment = dataclasses.replace(experiment, steps=None, epochs=2.0)
    model, processor = starting_model.start_model(experiment)
    first = resolve.resolve(experiment, model, processor)
    assert isinstance(first.data.seq_len, int)
    assert isinstance(first.data.max_patches, int)
    assert resolve.resolve(experiment, model, processor) == first
    write_json(tmp_path / "run" / "experiment.json", config_tree.to_dict(first))
    words = [{"role": "user", "content": "is there a red shape? " * 20}, {"role": "assistant", "content": "no"}]
    with open(examples, "a") as file:
        file.write(f"{json.dumps({'messages': words})}\n" * 5)
    assert resolve.resolve(experiment, model, processor) != first
    assert resolve.resolve(experiment, model, processor, tmp_path / "run") == first


def test_a_folder_of_a_saved_model_is_no_run_to_go_on_with(tmp_path):
    write_json(tmp_path / "run" / "experiment.json", {"model": {}})
    with pytest.raises(UserError, match="holds a saved model and not a training run"):
        runs.train(support.experiment(tmp_path, support.write_examples(tmp_path / "data", 2)))


def test_a_file_is_never_seen_half_written(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}

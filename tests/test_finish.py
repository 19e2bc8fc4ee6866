"""What comes after the training: bad evaluation examples are named before it, and nothing that fails loses the rest."""

from __future__ import annotations

import json

import pytest

from jvlm import cli, configs, job
from jvlm.errors import UserError
from jvlm.evaluation import usable
from tests.training import support


def _example(answer: str = "no", **fields) -> str:
    messages = [{"role": "user", "content": "is there a red shape?"}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, **fields})


MISSING = json.dumps(
    {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}], "images": ["no.png"]}
)
BAD = {
    "a picture that is not there": (MISSING, "no.png"),
    "no JSON": ("{not json", "not JSON"),
    "an unknown role": (_example().replace('"user"', '"robot"'), "robot"),
    "nothing to ask": (json.dumps({"messages": [{"role": "user", "content": "hi"}]}), "assistant"),
}


def _options(folder, examples: str) -> list[str]:
    path = folder / "test.jsonl"
    path.write_text(examples)
    return ["--evaluation.data", str(path), "--evaluation.max_new_tokens", "2", "--steps", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return support.write_examples(tmp_path_factory.mktemp("data"), 6)


@pytest.mark.parametrize("name", BAD)
def test_bad_evaluation_examples_are_named_before_the_first_step(tmp_path, data, name):
    line, said = BAD[name]
    options = _options(tmp_path, f"{_example()}\n{line}\n{_example()}\n{line}\n")
    with pytest.raises(UserError, match=rf"(?s)evaluation.data: 2 of 4 examples.*{said}.*test.jsonl"):
        job.run(support.experiment(tmp_path, data, *options))
    assert not list(tmp_path.glob("run/logging.jsonl")), "nothing was trained"


def test_columns_of_evaluation_data_are_renamed(tmp_path, data):
    rows = [{"frage": "is there a red shape?", "antwort": "no"}, {"frage": "?", "antwort": "yes"}, {"frage": "?"}]
    options = _options(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    options += ["--evaluation.columns", "frage=query", "antwort=response"]
    with pytest.raises(UserError, match=r"(?s)evaluation.data: 1 of 3 examples.*test.jsonl, line 3"):
        job.run(support.experiment(tmp_path, data, *options))
    config = support.experiment(tmp_path, data, *options).evaluation
    read = list(usable.examples_of(config.data, options=config.options(), rejected=[]))
    assert [one.messages[1].text for one in read] == ["no", "yes"]


def test_examples_behind_max_examples_are_not_asked_and_so_not_checked(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(f"{_example()}\n{_example()}\nnot json\n")
    usable.check([str(path)], _Encodes(), max_examples=2)
    with pytest.raises(UserError, match="1 of 3 examples"):
        usable.check([str(path)], _Encodes())


class _Encodes:
    def encode(self, conversation):
        return conversation


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("finish")
    experiment = support.experiment(folder, data, *_options(folder, f"{_example()}\n{_example('yes')}\n"))
    job.run(experiment)
    return folder, experiment


FILES = {"answers.jsonl", "scores.json", "report.html"}


def _fail(error):
    def fails(*_, **__):
        raise error

    return fails


FAILURES = {
    "scoring": (job.score, "ask", RuntimeError("out of memory"), {"report.html"}),
    "report": (job.report, "write", OSError("no space left"), {"answers.jsonl", "scores.json"}),
    "text-only baseline": (job, "text_only_baseline", UserError("a bad training example"), FILES),
    "export": (job.hf, "save", UserError("cannot be written"), FILES),
    "reading the export back": (job, "verify", RuntimeError("answers differently"), FILES),
}


@pytest.mark.parametrize(
    "parts",
    [
        ("scoring",),
        ("export",),
        pytest.param(("report", "text-only baseline", "reading the export back"), marks=pytest.mark.slow),
    ],
)
def test_parts_that_fail_are_named_and_all_others_are_written(finished, monkeypatch, capsys, parts):
    folder, experiment = finished
    run = folder / "run"
    for file in FILES:
        (run / file).unlink(missing_ok=True)
    for file in (run / "hf").glob("*"):
        file.unlink()
    errors = []
    for part in parts:
        owner, name, error, _ = FAILURES[part]
        monkeypatch.setattr(owner, name, _fail(error))
        errors.append(error)
    kind = UserError if all(isinstance(error, UserError) for error in errors) else RuntimeError
    with pytest.raises(kind, match=r"(?s)the model is trained.*the same command") as raised:
        job.run(experiment)
    printed = capsys.readouterr().err
    for part, error in zip(parts, errors, strict=True):
        assert f"{part}: {error}" in str(raised.value)
        assert f"{part} FAILED" in printed
    expected = set.intersection(*(FAILURES[part][3] for part in parts))
    assert {file for file in FILES if (run / file).is_file()} == expected
    assert bool(list((run / "hf").glob("*.safetensors"))) == ("export" not in parts)


def test_the_command_ends_with_a_status_and_no_traceback_where_a_part_failed(finished, monkeypatch, capsys):
    folder, experiment = finished
    for file in FILES:
        (folder / "run" / file).unlink(missing_ok=True)
    monkeypatch.setattr(configs, "load", lambda *_: experiment)
    monkeypatch.setattr(job, "text_only_baseline", _fail(UserError("a bad training example")))
    assert cli.main(["train", "any"]) == 2
    said = capsys.readouterr().err
    assert "text-only baseline: a bad training example" in said
    assert "Traceback" not in said
    assert all((folder / "run" / file).is_file() for file in FILES)


def test_evaluation_examples_found_bad_only_then_are_listed_and_the_others_scored(finished, monkeypatch, tmp_path):
    folder, experiment = finished
    monkeypatch.setattr(usable, "check", lambda *_, **__: None)  # as if the sample had missed them
    options = _options(tmp_path, f"{_example()}\nnot json\n{MISSING}\n{_example('yes')}\n")
    job.run(support.experiment(folder, experiment.data.train[0], *options))
    run = folder / "run"
    assert [json.loads(line)["number"] for line in (run / "answers.jsonl").read_text().splitlines()] == [1, 4]
    listed = [json.loads(line) for line in (run / "evaluation_rejected.jsonl").read_text().splitlines()]
    assert [(line["number"], line["field"]) for line in listed] == [(2, "example"), (3, "images[0]")]
    scores = json.loads((run / "scores.json").read_text())
    assert (scores["questions"], scores["examples_left_out"]) == (2, 2)


def test_the_text_only_baseline_leaves_out_bad_training_examples_as_training_does(tmp_path, data, capsys):
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(f"{_example('no')}\n" for _ in range(8)) + "not json\n")
    options = [*_options(tmp_path, f"{_example()}\n{_example('yes')}\n"), "--data.on_bad_example", "skip"]
    folder = job.run(support.experiment(tmp_path, path, *options))
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["text_only_baseline"]["accuracy"] == 0.5
    assert "text-only baseline: 1 training examples left out" in capsys.readouterr().out
    assert (folder / "report.html").is_file()
    assert (folder / "hf" / "config.json").is_file()

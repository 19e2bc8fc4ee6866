"""The main job on a small experiment: what the demo promises, and the command line in front of it."""

from __future__ import annotations

import json

import pytest

import jvlm
from jvlm import cli, configs, job
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.sweep import tasks, tasks_page
from jvlm.training.starting_model import start_model
from tests.training import support


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    examples = support.write_examples(folder, 12)
    options = ("--evaluation.data", str(examples), "--evaluation.max_new_tokens", "6")
    experiment = support.experiment(folder, examples, *options, "--evaluation.before_training", "True")
    return job.run(experiment), examples


def test_the_run_leaves_scores_answers_an_export_and_a_report(finished):
    folder, examples = finished
    scores = json.loads((folder / "scores.json").read_text())
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert scores["questions"] == len(answers) == 2 * len(examples.read_text().splitlines())
    assert scores["accuracy"] == pytest.approx(sum(a["score"] for a in answers) / len(answers), abs=1e-4)
    assert 0 < scores["text_only_baseline"]["accuracy"] <= 1
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_scores_come_with_how_full_the_sequences_were_that_the_run_learnt_from(finished):
    """Qwen3-VL#1171: packing changes scores a little, so that figures without their fill do not compare."""
    folder, _ = finished
    values = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    lines = [line for line in values if "padding_text" in line]
    numbers = [line["step_number"] for line in lines]
    steps = [after - before for before, after in zip([0, *numbers], numbers, strict=False)]
    full = {
        name: 1 - sum(n * line[f"padding_{key}"] for n, line in zip(steps, lines, strict=True)) / sum(steps)
        for name, key in (("tokens", "text"), ("patches", "patches"))
    }
    assert json.loads((folder / "scores.json").read_text())["fill"] == pytest.approx(full)
    words = f"{100 * full['tokens']:.1f} % of the tokens, {100 * full['patches']:.1f} % of the patches"
    assert words in (folder / "report.html").read_text()
    run = tasks.read(folder)
    cells = f"| {100 * full['tokens']:.1f}, {100 * full['patches']:.1f} |"
    assert cells in tasks.markdown([run])
    assert cells.strip("| ") in tasks_page.render([run], "a run").decode()


def test_the_model_before_training_is_scored_on_the_same_questions_and_shown_beside_it(finished):
    folder, examples = finished
    after, before = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("answers.jsonl", "answers_before_training.jsonl")
    )
    assert [a["question"] for a in before] == [a["question"] for a in after]
    model, processor = start_model(support.experiment(folder.parent, examples))
    prompts = [json.loads(line) for line in examples.read_text().splitlines()]
    for prompt in prompts:
        prompt["images"] = [str(examples.parent / name) for name in prompt["images"]]
        prompt["messages"] = prompt["messages"][:1]
    texts = jvlm.generate(model, processor, prompts, max_new_tokens=6)
    assert [a["response"] for a in before if a["turn"] == before[0]["turn"]] == texts
    written = json.loads((folder / "scores.json").read_text())
    scores = written["before_training"]
    assert scores["accuracy"] == pytest.approx(sum(a["score"] for a in before) / len(before), abs=1e-4)
    change = next(change for change in written["changes"] if change["name"] == "words")["change"]
    assert change["value"] == pytest.approx(written["accuracy"] - scores["accuracy"])
    assert change["low"] <= change["value"] <= change["high"]
    assert "Before and after training" in (folder / "report.html").read_text()


def test_run_folder_and_export_answer_alike(finished):
    folder, examples = finished
    example = json.loads(examples.read_text().splitlines()[2])
    example["images"] = [str(examples.parent / name) for name in example["images"]]
    example["messages"] = example["messages"][:1]
    texts = []
    for path in (folder, folder / "hf"):
        model, processor = jvlm.load(path)
        texts.append(jvlm.generate(model, processor, [example], max_new_tokens=8))
    assert texts[0] == texts[1]


def test_an_export_that_answers_differently_than_the_model_is_an_error_and_no_fault_of_the_user(finished, monkeypatch):
    folder, examples = finished
    write = job.export

    def damaged(experiment, result):
        line = write(experiment, result)
        model, processor = jvlm.load(folder / "hf")
        scale = vlm.parameters(model)["decoder.norm.scale"]
        scale.set_value(-scale.get_value())
        jvlm.save(model, processor, folder / "hf")
        return line

    monkeypatch.setattr(job, "export", damaged)
    options = ("--evaluation.data", str(examples), "--evaluation.max_new_tokens", "6")
    with pytest.raises(RuntimeError, match=r"export back: .*hf answers \d+ of 24 questions differently"):
        job.run(support.experiment(folder.parent, examples, *options))


@pytest.mark.parametrize(
    ("aims", "status", "said"),
    [
        (["--evaluation.aim", "0"], 0, ""),
        (["--evaluation.aim", "100"], 3, "of 16 questions are answered right, evaluation.aim is 100 %"),
        (["--evaluation.aim_iou", "0"], 3, "evaluation.aim_iou is 0, but no answer of evaluation.data has a box"),
    ],
)
def test_a_run_that_misses_its_aim_writes_everything_and_ends_with_status_3(
    finished, tmp_path, capsys, aims, status, said
):
    folder, examples = finished
    config = tmp_path / "config.py"
    arguments = (
        str(folder.parent),
        str(examples),
        "--evaluation.data",
        str(examples),
        "--evaluation.max_new_tokens",
        "6",
    )
    config.write_text(
        "from pathlib import Path\nfrom tests.training import support\n"
        f"def get_config():\n    folder, examples, *overrides = {arguments!r}\n"
        "    return support.experiment(Path(folder), Path(examples), *overrides)\n"
    )
    (folder / "report.html").unlink()
    assert cli.main(["train", str(config), "--evaluation.max_examples", "8", *aims]) == status
    assert said in capsys.readouterr().err
    assert ">aim<" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_training_continues_from_an_export_and_from_a_run(finished, tmp_path):
    folder, examples = finished
    for name, source in (("from_run", folder), ("from_hf", folder / "hf")):
        options = ("--init_from", str(source), "--name", name, "--steps", "1", "--export.enabled", "False")
        result = job.run(support.experiment(tmp_path, examples, *options))
        line = json.loads((result / "logging.jsonl").read_text().splitlines()[0])
        before = json.loads((folder / "logging.jsonl").read_text().splitlines()[0])
        assert line["loss"] < before["loss"]


@pytest.mark.parametrize("wrong", ["--optimizer.learning_rat", "--learning_rate", "--optimizer.learning-rat=1"])
def test_a_wrong_field_is_refused_naming_the_nearest(wrong):
    with pytest.raises(UserError, match=r"did you mean --optimizer\.learning_rate\?"):
        configs.load("mimo_vl/easy_vqa", [wrong, "1"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nowhere.py"], "no config at nowhere.py"),
        (["train", "mimo_vl/easy_vqa", "--data.train", "gone.jsonl", "--output_root", "{tmp}"], "'gone.jsonl'"),
        (["train", "mimo_vl/easy_vqa", "--data.batch_size", "0"], "data.batch_size must be at least 1"),
        (["generate", "--model", "gone", "--prompt", "hi"], "gone is not a folder"),
        (["generate", "--model", "gone"], "give either --prompt"),
        (["data", "check", "gone.jsonl"], "no data file matches 'gone.jsonl'"),
    ],
)
def test_a_mistake_gives_one_message_and_status_2(arguments, said, capsys, tmp_path):
    try:
        status = cli.main([a.format(tmp=tmp_path) for a in arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    output = "".join(capsys.readouterr())
    assert said in output
    assert "Traceback" not in output


def test_the_command_line_generates_and_checks(finished, tmp_path, capsys):
    folder, examples = finished
    picture = str(examples.parent / "2_0.png")
    arguments = ["generate", "--model", str(folder / "hf"), "--image", picture, "--prompt", "what color is the shape?"]
    assert cli.main([*arguments, "--max_new_tokens", "4"]) == 0
    assert cli.main(["data", "check", str(examples), "--model", str(folder)]) == 0
    assert "12 of 12 examples can be used" in capsys.readouterr().out
    output = tmp_path / "answers.jsonl"
    arguments = ["generate", "--model", str(folder), "--data", str(examples), "--output", str(output)]
    assert cli.main([*arguments, "--max_new_tokens", "4"]) == 0
    assert len(output.read_text().splitlines()) == 12

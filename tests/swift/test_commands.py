"""The two command lines that MiMo-VL's users were told to type, and what follows them, on a small checkpoint."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import jvlm
from jvlm import cli, configs
from jvlm.data.example_source import ExampleSource
from tests.swift.test_words import CANONICAL
from tests.training.support import write_examples

INFER = "--stream false --max_batch_size 1 --load_data_args true --max_new_tokens 2048"
# The small model's positions are few, and its first steps must teach it something.
SMALL = {"--max_length 2048": "--max_length 512", "--num_train_epochs 2": "--max_steps 4", "#20000": "#40"}
SMALL |= {"--per_device_train_batch_size 16": "--per_device_train_batch_size 4", "_steps 50": "_steps 2"}
SMALL |= {"--dataloader_num_workers 4": "--dataloader_num_workers 1", "1e-4": "1e-2"}


def small(line, model, folder):
    for before, after in {
        **SMALL,
        "DIR": str(model),
        "formulas": "examples",
        "output_dir output": "output_dir out",
    }.items():
        assert before in line, before
        line = line.replace(before, after)
    return shlex.split(line)


def jvlm_in(folder, *words):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "jvlm.cli", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """The folder of a run of the first line."""
    folder = tmp_path_factory.mktemp("swift")
    write_examples(folder, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["sft", *small(CANONICAL, tiny.folder, folder)]) == 0
    (run,) = (folder / "out").iterdir()
    return run


def test_the_line_stands_for_an_experiment_whose_sizes_come_from_the_data(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path, 16)
    assert cli.main(["sft", *small(CANONICAL, tiny.folder, tmp_path), "--write_config", "run.py"]) == 0
    experiment = configs.load("run.py")
    assert experiment.adapter.exclude == ("encoder", "connector")
    assert experiment.data.train == ("examples.jsonl#40",)
    # 16 different examples, of which 1 % is less than one
    assert experiment.validation.split == 1
    assert experiment.data.batch_size == 1
    assert experiment.data.seq_len % 64 == 0
    assert "--attn_impl has no use here" in capsys.readouterr().err


def test_columns_of_other_names_are_read_by_those_that_are_given(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [{"my_q": f"what is {n}?", "my_a": f"it is {n}", "raw": n} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = '{"my_q": "query", "my_a": "response", "raw": "_"}'
    words = ["sft", "--model", str(tiny.folder), "--dataset", "rows.jsonl", "--max_length", "256"]
    assert cli.main([*words, "--columns", columns, "--write_config", "run.py"]) == 0
    experiment = configs.load("run.py")
    assert experiment.data.columns == ("my_q=query", "my_a=response", "raw=_")
    _, record = ExampleSource.of(experiment.data)[3]
    assert [turn["content"] for turn in record["messages"]] == ["what is 3?", "it is 3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset examples.jsonl", "--model is missing"),
        ("--model DIR", "--dataset is missing"),
        ("--model DIR --dataset nothing.jsonl", "no data file matches 'nothing.jsonl'"),
        ("--model DIR --dataset empty.jsonl", "empty.jsonl: empty, 0 bytes"),
        ("--model DIR --dataset bad.jsonl", "none of 2 examples looked at can be used"),
        ("--model DIR --dataset bad.jsonl", "line 2"),
        ("--model DIR --dataset examples.jsonl --max_length 4", "none of 3 examples looked at can be used"),
        ("--model nowhere --dataset examples.jsonl", "nowhere is not a folder"),
        ("--resume_from_checkpoint nowhere/checkpoint-5", "not RUN/checkpoint-STEP"),
        ("--model DIR --dataset examples.jsonl --adapters a b", "goes on with one adapter"),
        ("--model DIR --dataset examples.jsonl --push_to_hub true", "needs --hub_model_id"),
    ],
)
def test_a_mistake_is_one_message(tiny, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path, 3)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user"}]}\n{"messages"\n')
    assert cli.main(["sft", *words.replace("DIR", str(tiny.folder)).split(), "--write_config", "run.py"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_run_has_what_users_of_ms_swift_look_for(trained):
    assert trained.name.startswith("v0-")
    assert {"checkpoint-2", "checkpoint-4", "args.json", "logging.jsonl"} <= {path.name for path in trained.iterdir()}
    values = json.loads((trained / "checkpoint-4" / "args.json").read_text())
    assert values["lora_rank"] == 8
    assert values["dataset"] == ["examples.jsonl#40"]
    lines = [json.loads(line) for line in (trained / "logging.jsonl").read_text().splitlines()]
    names = "loss grad_norm learning_rate token_acc epoch global_step/max_steps elapsed_time remaining_time memory(GiB)"
    assert {*names.split(), "train_speed(s/it)"} <= set(lines[0])
    assert any("eval_loss" in line and "eval_token_acc" in line for line in lines)


@pytest.mark.slow
def test_checkpoints_hold_peft_s_tensors_of_the_language_model_alone(trained, tiny):
    tensors = load_file(trained / "checkpoint-4" / "adapter_model.safetensors")
    assert tensors
    assert all(".language_model.layers." in name or ".model.layers." in name for name in tensors)
    assert {a.shape[0] for name, a in tensors.items() if "lora_A" in name} == {8}
    assert any(np.any(b != 0) for name, b in tensors.items() if "lora_B" in name)


@pytest.mark.slow
def test_the_written_config_is_the_experiment_of_the_run(trained, tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(trained.parent.parent)
    words = small(CANONICAL, tiny.folder, None)
    assert cli.main(["sft", *words, "--write_config", str(tmp_path / "run.py")]) == 0
    from jvlm.training.resume import plain_values

    written = plain_values(configs.load(str(tmp_path / "run.py")))
    saved = json.loads((trained / "experiment.json").read_text())
    assert written["name"].startswith("v1-")
    # the rest is what a run fills in when it starts
    for name in (
        "adapter",
        "quantize",
        "optimizer",
        "validation",
        "checkpoint",
        "hooks",
        "gradient_accumulation_steps",
    ):
        assert written[name] == saved[name], name
    assert {name: saved["data"][name] for name in ("train", "seq_len", "max_patches", "batch_size", "max_length")} == {
        name: written["data"][name] for name in ("train", "seq_len", "max_patches", "batch_size", "max_length")
    }


@pytest.mark.slow
def test_the_two_lines_and_a_merge_end_to_end(trained, tiny, monkeypatch, capfd):
    """The second in a process of its own; what comes of the first is that of this one."""
    run, folder = trained, trained.parent.parent
    monkeypatch.chdir(folder)
    checkpoint = str((run / "checkpoint-4").relative_to(folder))
    line = INFER.replace("2048", "8")
    jvlm_in(folder, "infer", "--adapters", checkpoint, *line.split(), "--result_path", "result.jsonl")
    held_out = json.loads((run / "validation_split.json").read_text())["validation"]
    results = [json.loads(line) for line in (folder / "result.jsonl").read_text().splitlines()]
    assert len(results) == len(held_out)
    assert results[0]["labels"] in ("yes", "no")
    assert cli.main(["merge-lora", "--adapters", checkpoint]) == 0
    merged, processor = jvlm.load(f"{run}/checkpoint-4-merged")
    row = {**results[0], "images": [str(folder / image) for image in results[0].get("images", [])]}
    row["messages"] = row["messages"][:-1]
    # both in float32: infer rounds the base to bfloat16 under an adapter, and the answers of so small a model with it
    adapted, _ = jvlm.load(tiny.folder, adapter=folder / checkpoint)
    answers = [jvlm.generate(model, processor, [row], max_new_tokens=8) for model in (adapted, merged)]
    assert answers[0] == answers[1]
    # the run goes on where it ended, which is at its end
    assert cli.main(["sft", "--resume_from_checkpoint", checkpoint]) == 0
    assert "resuming after step 4" in "".join(capfd.readouterr())

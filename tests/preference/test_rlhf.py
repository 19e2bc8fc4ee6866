"""``jvlm rlhf``: its arguments as ms-swift has them, and runs that end, stop and go on."""

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import jvlm
from jvlm import cli, configs
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.preference import precomputed
from jvlm.preference.labels import LabelledTask
from jvlm.preference.pairs import PreferenceTask
from jvlm.reward_model.task import RewardTask
from jvlm.swift import preference, saved
from jvlm.swift.arguments import RlhfArguments
from jvlm.swift.words import parse
from jvlm.weights.fingerprints import fingerprints
from tests.preference.support import write_labels, write_pairs, write_text_model

NEW = {"reference": "adapter_off"}


def task(line):
    parsed = parse(RlhfArguments, shlex.split(f"--model DIR {line}"), "jvlm rlhf")
    return preference.task_of(parsed.arguments, parsed.given)


# ms-swift 4.6, docs/source_en/Instruction/Command-line-parameters.md
@pytest.mark.parametrize(
    ("name", "default"),
    [
        *(("rlhf_type", "dpo"), ("beta", None), ("loss_type", None), ("rpo_alpha", None), ("label_smoothing", 0)),
        *(("cpo_alpha", 1), ("simpo_gamma", 1), ("desirable_weight", 1), ("undesirable_weight", 1)),
        *(("ld_alpha", None), ("discopop_tau", 0.05), ("center_rewards_coefficient", None)),
        *(("loss_scale", "last_round"), ("ref_model", None), ("ref_adapters", ()), ("lora_rank", 8)),
    ],
)
def test_defaults_are_those_of_ms_swift(name, default):
    assert saved.flat(parse(RlhfArguments, [], "jvlm rlhf").arguments)[name] == default


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", PreferenceTask(**NEW)),
        ("--train_type full", PreferenceTask()),
        ("--adapters A", PreferenceTask()),
        ("--modules_to_save lm_head", PreferenceTask()),
        ("--rpo_alpha 1", PreferenceTask(sft_weight=1.0, **NEW)),
        ("--loss_type ipo --beta 0.5", PreferenceTask(("ipo",), beta=0.5, **NEW)),
        (
            "--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1",
            PreferenceTask(("sigmoid", "bco_pair"), (0.8, 0.2), 1.0, **NEW),
        ),
        ("--rlhf_type simpo", PreferenceTask(("simpo",), sft_weight=1.0, beta=2.0, gamma=1.0)),
        ("--rlhf_type cpo --cpo_alpha 0", PreferenceTask(("cpo",))),
        ("--rlhf_type orpo", PreferenceTask(("orpo",), sft_weight=1.0)),
        ("--rlhf_type kto --desirable_weight 1.3", LabelledTask(desirable_weight=1.3, **NEW)),
        ("--rlhf_type rm --center_rewards_coefficient 0.01", RewardTask(0.01)),
    ],
)
def test_arguments_are_a_task(line, expected):
    assert task(line) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--rlhf_type ppo", "take grpo"),
        ("--num_generations 4", "--num_generations is an argument of --rlhf_type grpo"),
        ("--loss_type sigmoid hing", "it is one or several of sigmoid, hinge"),
        ("--loss_type sigmoid sft --loss_weights 1", "1 numbers for 2"),
        ("--loss_type sft", "learns nothing of rejected answers"),
        ("--rlhf_type orpo --simpo_gamma 2", "--simpo_gamma is an argument of --rlhf_type simpo"),
        ("--rlhf_type kto --loss_type bco", "it is kto or apo_zero_unpaired"),
        ("--ref_model OTHER", "the reference is the model before training"),
        ("--neftune_noise_alpha 5", "differ from its reference"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_nearest_thing(line, message):
    with pytest.raises(UserError) as refused:
        task(line)
    assert message in str(refused.value)


def run(folder, tiny, *words):
    base = ["--model", str(tiny.folder), "--max_length", "256", "--max_steps", "4", "--save_steps", "2"]
    base += ["--learning_rate", "1e-2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    base += ["--logging_steps", "1", "--output_dir", "out", "--torch_dtype", "float32"]
    return cli.main(["rlhf", *base, *words])


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """The folder of a run of DPO with LoRA."""
    folder = tmp_path_factory.mktemp("rlhf")
    write_pairs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ("--dataset", "pairs.jsonl", "--split_dataset_ratio", "0.2", "--eval_steps", "2")
        assert run(folder, tiny, *words) == 0
    (path,) = (folder / "out").iterdir()
    return path


def test_dpo_begins_at_the_loss_of_a_coin_and_learns(trained):
    steps, evaluations = log_of(trained)
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["loss"] < np.log(2) - 0.02
    names = {f"{what}/{name}" for what in ("rewards", "logps") for name in ("chosen", "rejected")}
    assert {*names, "rewards/accuracies", "rewards/margins", "nll_loss"} <= set(steps[0])
    assert {"eval_rewards/accuracies", "eval_rewards/margins"} <= set(evaluations[-1])
    values = json.loads((trained / "checkpoint-4" / "args.json").read_text())
    assert (values["command"], values["rlhf_type"]) == ("rlhf", "dpo")


@pytest.mark.parametrize(
    ("line", "task", "kind"),
    [
        ("--dataset pairs.jsonl --rpo_alpha 1", PreferenceTask(sft_weight=1.0, **NEW), "pairs"),
        ("--dataset labels.jsonl --rlhf_type kto", LabelledTask(**NEW), "labels"),
        ("--dataset pairs.jsonl --rlhf_type rm", RewardTask(), "pairs"),
    ],
)
def test_the_line_is_written_as_a_config(line, task, kind, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_labels(tmp_path, 6)
    assert run(tmp_path, tiny, *line.split(), "--write_config", "made.py") == 0
    experiment = configs.load("made.py")
    assert experiment.task == task
    assert (experiment.data.preference, experiment.data.loss) == (kind, "last_answer")
    is_reward_model = isinstance(task, RewardTask)
    assert experiment.adapt.labels == (1 if is_reward_model else None)
    assert experiment.adapter.train_modules == (("score",) if is_reward_model else ())


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    ["--rlhf_type dpo --train_type full --learning_rate 1e-3", "--rlhf_type rm --train_type lora --learning_rate 1e-2"],
)
def test_a_language_model_s_folder_is_trained_on_text(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [
        {"prompt": f"is {n} even?", "chosen": ("yes", "no")[n % 2], "rejected": ("no", "yes")[n % 2]} for n in range(16)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))
    write_text_model(tmp_path / "qwen2", 0)
    words = f"rlhf --model qwen2 --dataset pairs.jsonl --max_steps 8 --per_device_train_batch_size 4 {line} "
    words += "--gradient_accumulation_steps 1 --logging_steps 1 --output_dir out --torch_dtype float32 "
    assert cli.main(shlex.split(words)) == 0
    (folder,) = (tmp_path / "out").iterdir()
    steps, _ = log_of(folder)
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-5 if "dpo" in line else 0.3)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.01
    model, _ = jvlm.load(folder)
    assert model.config.family == "composed"
    assert (model.adapters is not None) == ("lora" in line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "--train_type full --freeze_vit false --freeze_aligner false --learning_rate 1e-4",
        "--rlhf_type rm --center_rewards_coefficient 0.01",
    ],
)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(line, tiny, tmp_path, monkeypatch):
    """Stopped by SIGKILL once its first checkpoint is whole, and started again by the same command, in this process."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path)
    words = f"--dataset pairs.jsonl {line}".split()
    if "--learning_rate" not in words:
        words += ["--learning_rate", "1e-3"]
    base = f"--model {tiny.folder} --max_length 256 --max_steps 8 --save_steps 2 --per_device_train_batch_size 2"
    base += " --gradient_accumulation_steps 2 --logging_steps 1 --torch_dtype float32 --add_version false"
    commands = {name: [*base.split(), *words, "--output_dir", f"out/{name}"] for name in ("whole", "killed")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert cli.main(["rlhf", *commands["whole"]]) == 0
    start = [sys.executable, "-m", "jvlm.cli", "rlhf", *commands["killed"]]
    process = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "out/killed/checkpoint-2").is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/killed/checkpoint-8").exists()
    assert cli.main(["rlhf", *commands["killed"]]) == 0
    models = [jvlm.load(tmp_path / "out" / name)[0] for name in commands]
    one, other = ({p: np.asarray(v.get_value()) for p, v in vlm.variables(m).items()} for m in models)
    assert all(np.array_equal(one[path], other[path]) for path in one)
    logs = [[line["loss"] for line in log_of(tmp_path / "out" / name)[0]] for name in commands]
    assert logs[0] == logs[1]
    if "full" in line:
        assert logs[0][0] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.slow
def test_a_precomputed_reference_gives_the_losses_of_the_reference_itself(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_pairs(tmp_path)
    assert run(tmp_path, tiny, "--dataset", "pairs.jsonl", "--split_dataset_ratio", "0.2", "--eval_steps", "2") == 0
    words = ("--dataset", "pairs.jsonl", "--split_dataset_ratio", "0.2", "--eval_steps", "2", "--output_dir", "pre")
    base = ["--model", str(tiny.folder), "--max_length", "256", "--max_steps", "4", "--save_steps", "2"]
    base += ["--learning_rate", "1e-2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    base += ["--logging_steps", "1", "--torch_dtype", "float32", "--add_version", "false"]
    with monkeypatch.context() as earlier:  # a file of jvlm 0.2.0
        earlier.setattr(precomputed, "fingerprints", functools.partial(fingerprints, version=1))
        assert cli.main(["rlhf", *base, *words, "--precompute_ref_log_probs", "true"]) == 0
    (first,) = (tmp_path / "out").iterdir()
    for one, other in zip(log_of(first), log_of(tmp_path / "pre"), strict=True):
        names = [name for name in one[0] if "reward" in name or "loss" in name]
        for before, after in zip(one, other, strict=True):
            for name in names:
                assert after[name] == pytest.approx(before[name], abs=2e-4), name
    file = tmp_path / "pre" / "reference_log_probs.npz"
    with np.load(file) as stored:
        assert len(stored["numbers"]) == len({*stored["numbers"].tolist()}) <= 2 * len(path.read_text().splitlines())
        arrays = {**stored, "fingerprint": np.asarray("another")}
    changed = ["--output_dir", "pre2", *base]
    assert cli.main(["rlhf", *changed, *words[:-2], "--write_config", "run.py", "--precompute_ref_log_probs"]) == 0
    overrides = ["--task.reference_file", str(file)]
    assert cli.main(["train", "run.py", *overrides, "--steps", "1"]) == 0
    np.savez(file, **arrays)
    assert cli.main(["train", "run.py", *overrides, "--name", "another"]) == 2
    assert "was written by another model" in capsys.readouterr().err

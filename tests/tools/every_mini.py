"""The papers in miniature, rehearsed: from their data over every stage to their reports. `make test-mini`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT
from tools.mini import make_data

MIMO = ("stage1", "stage2", "stage3", "stage4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a small part of the data, in which commands run."""
    folder = tmp_path_factory.mktemp("mini")
    make_data.make(folder / "mini_data", share=0.02)
    rewards = (ROOT / "tools/mini/rehearsal.json").read_text()
    (folder / "rehearsal.json").write_text(rewards.replace("tools/mini/", f"{ROOT}/tools/mini/"))
    return folder


def jvlm(folder: Path, *words: str) -> str:
    return run(folder, "jvlm.cli", *words)


def run(folder: Path, module: str, *words: str) -> str:
    command = [sys.executable, "-m", module, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def logged(folder: Path, name: str) -> list[dict]:
    with open(folder / "runs" / name / "logging.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_mimo_goes_from_its_first_stage_to_rewards_and_one_report(folder):
    jvlm(folder, "train", "mini/mimo_start", "--steps", "2")
    for stage in MIMO:
        jvlm(folder, "train", f"mini/mimo_{stage}", "--steps", "2")
    jvlm(folder, "rl", "mini/mimo_rl", "--steps", "1", *EASY)
    runs = [f"runs/mimo_mini_{name}" for name in (*MIMO, "rl")]
    printed = jvlm(folder, "report", *runs, "--output", "runs/mimo_mini.html")
    tasks = {line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines() if line.startswith("| ")}
    assert {"grounding", "counting", "ocr", "gui", "video", "reasoning", "long_documents"} <= tasks
    rewards = {key for line in logged(folder, "mimo_mini_rl") for key in line if key.startswith("eval_reward/")}
    assert {f"eval_reward/{task}" for task in ("grounding", "counting", "ocr", "gui", "reasoning")} <= rewards
    assert (folder / "runs" / "mimo_mini.html").stat().st_size > 50_000


@pytest.mark.parametrize(
    ("paper", "stages", "ablation", "others"),
    [
        ("mm1_5", ("pretrain", "continual", "sft"), "tiles", ("moe",)),
        (
            "idefics2",
            ("start", "stage1", "stage2", "sft", "chatty"),
            "chatty",
            ("sft_lora", "sft_dora", "cross_attention"),
        ),
    ],
)
def test_a_paper_goes_from_its_first_stage_to_the_page_of_an_ablation(folder, paper, stages, ablation, others):
    for stage in (*stages, *others):
        jvlm(folder, "train", f"mini/{paper}_{stage}", "--steps", "2")
    printed = run(folder, "tools.mini.papers", paper, "--only", ablation, "--seeds", "1", "2", "--steps", "2")
    assert f"| setting | score/{'lines' if paper == 'mm1_5' else 'dialogue'} |" in printed
    page = (folder / "runs" / f"{paper}_mini.html").read_text()
    assert page.count("<h2>") == 1
    assert "95 % interval" in page


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_idefics2_is_pretrained_with_adapters_on_the_merged_ones_of_the_stage_before(folder, adapter):
    if not (folder / "runs" / "idefics2_mini_start").exists():
        jvlm(folder, "train", "mini/idefics2_start", "--steps", "2")
    jvlm(folder, "train", f"mini/idefics2_stage1_{adapter}", "--steps", "2")
    jvlm(folder, "train", f"mini/idefics2_stage2_{adapter}", "--steps", "2")
    assert logged(folder, f"idefics2_mini_stage2_{adapter}")[-1]["eval_loss"] > 0


# a model of a few steps earns nothing but by a word that it says now and then
# relative paths of reward files are of the folder that a command runs in, which is the repository's for make
EASY = ("--task.rollout.temperature", "1", "--task.rewards.file", "rehearsal.json")
ONE_TASK = ("--evaluation.data", "mini_data/test_counting.arrayrecord")
KILLED = {
    "train": ("mini/mimo_stage1", *ONE_TASK, "--steps", "6", "--checkpoint.save_interval_steps", "2"),
    "rl": (
        *("mini/mimo_rl", *ONE_TASK, "--steps", "4", "--checkpoint.save_interval_steps", "2"),
        *("--task.selection.groups", "6", "--task.rollout.max_tokens", "12", *EASY),
    ),
}


@pytest.mark.parametrize("command", KILLED)
def test_a_stage_that_is_killed_and_started_again_ends_with_the_same_numbers(folder, command):
    start = folder / "runs" / "killed_start"
    if not start.exists():
        jvlm(folder, "train", "mini/mimo_start", "--steps", "2", "--name", start.name)
    words = (command, *KILLED[command], "--init_from", f"runs/{start.name}", "--log_interval_steps", "1")
    whole, broken = f"{command}_whole", f"{command}_broken"
    jvlm(folder, *words, "--name", whole)
    kill_behind_step(folder, 3, words, broken)
    jvlm(folder, *words, "--name", broken)
    numbers = [
        [
            (line["step_number"], line["loss"], line["grad_norm"], line.get("reward"))
            for line in logged(folder, name)
            if "loss" in line
        ]
        for name in (whole, broken)
    ]
    assert len(numbers[0]) == int(words[words.index("--steps") + 1])
    assert numbers[1] == numbers[0]
    answers = [(folder / "runs" / name / "answers.jsonl").read_bytes() for name in (whole, broken)]
    assert answers[1] == answers[0] != b""


def kill_behind_step(folder: Path, step: int, words: tuple[str, ...], name: str) -> None:
    """Start a command and kill it with all its processes as soon as it has logged a step."""
    command = [sys.executable, "-m", "jvlm.cli", *words, "--name", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = folder / "runs" / name / "logging.jsonl"
    with open(folder / f"{name}.txt", "w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    began = time.monotonic()
    while not log.exists() or f'"step_number": {step}' not in log.read_text():
        assert process.poll() is None, (folder / f"{name}.txt").read_text()[-4000:]
        assert time.monotonic() - began < 600
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

"""The papers in miniature, rehearsed: from their data over every stage to their reports. `make test-mini`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
    jvlm(folder, "rl", "mini/mimo_rl", "--steps", "1")
    runs = [f"runs/mimo_mini_{name}" for name in (*MIMO, "rl")]
    printed = jvlm(folder, "report", *runs, "--output", "runs/mimo_mini.html")
    tasks = {line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines() if line.startswith("| ")}
    assert {"grounding", "counting", "ocr", "gui", "video", "reasoning", "long_documents"} <= tasks
    rewards = {key for line in logged(folder, "mimo_mini_rl") for key in line if key.startswith("eval_reward/")}
    assert {f"eval_reward/{task}" for task in ("grounding", "counting", "ocr", "gui", "text", "reasoning")} <= rewards
    assert (folder / "runs" / "mimo_mini.html").stat().st_size > 50_000


@pytest.mark.parametrize(
    ("paper", "stages", "ablation", "others"),
    [
        ("mm1_5", ("pretrain", "continual", "sft"), "tiles", ("moe",)),
        ("idefics2", ("stage1", "stage2", "sft"), "splitting", ("sft_lora", "sft_dora", "cross_attention")),
    ],
)
def test_a_paper_goes_from_its_first_stage_to_the_page_of_an_ablation(folder, paper, stages, ablation, others):
    for stage in (*stages, *others):
        jvlm(folder, "train", f"mini/{paper}_{stage}", "--steps", "2")
    printed = run(folder, "tools.mini.papers", paper, "--only", ablation, "--seeds", "1", "2", "--steps", "2")
    assert "| setting | score/lines |" in printed
    page = (folder / "runs" / f"{paper}_mini.html").read_text()
    assert page.count("<h2>") == 1
    assert "95 % interval" in page

"""Sweeps: their trials, running and going on, and the comparison, with a small program in the place of training."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from scipy import stats

from jvlm import cli
from jvlm.cli import sweep as sweep_command
from jvlm.errors import UserError
from jvlm.sweep import results, runner, trials
from jvlm.sweep.trials import Vary

# "trains" a trial: writes answers that are right as often as the learning rate says, and counts its starts
PROGRAM = """
import json, pathlib, sys, time
name, root, *fields = sys.argv[1:]
values = dict(zip(fields[::2], fields[1::2]))
folder = pathlib.Path(root, name); folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file: file.write("x")
rate = float(values["--optimizer.learning_rate"])
if rate > 1: sys.exit("diverged")
if "--slow" in values: (folder / "going").touch(); time.sleep(60)
right = [float((7 * q + int(values["--seed"])) % 10 < 10 * rate) for q in range(200)]
lines = [{"file": "test", "number": q, "turn": 0, "score": score} for q, score in enumerate(right)]
(folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
log = [{"step_number": step, "loss": 2.0 - rate - step / 10} for step in range(10)]
(folder / "logging.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in log) + '{"loss": 9')
"""


def chosen(*varied: str, together: bool = False) -> list[trials.Trial]:
    return trials.trials_of("mimo_vl/easy_vqa", [Vary.parse(text) for text in varied], together=together)


def test_every_combination_is_a_trial_and_the_last_field_changes_fastest():
    found = chosen("optimizer.learning_rate=1e-3,3e-3", "seed=1,2")
    assert [trial.slug for trial in found] == [
        "learning-rate-1e-3-seed-1",
        "learning-rate-1e-3-seed-2",
        "learning-rate-3e-3-seed-1",
        "learning-rate-3e-3-seed-2",
    ]
    assert found[3].words == ["--optimizer.learning_rate", "3e-3", "--seed", "2"]
    assert found[0].settings == found[1].settings == (("optimizer.learning_rate", "1e-3"),)


def test_fields_change_in_step_where_they_are_asked_to():
    found = chosen("data.seq_len=128,256", "data.batch_size=8,4", together=True)
    assert [dict(trial.values) for trial in found] == [
        {"data.seq_len": "128", "data.batch_size": "8"},
        {"data.seq_len": "256", "data.batch_size": "4"},
    ]
    with pytest.raises(UserError, match=r"data\.seq_len has 2, data\.batch_size has 1"):
        chosen("data.seq_len=128,256", "data.batch_size=8", together=True)


def test_fields_that_change_in_step_are_run_with_every_seed():
    found = chosen("data.seq_len=128,256", "data.batch_size=8,4", "seed=1,2,3", together=True)
    assert [tuple(trial.values.values()) for trial in found] == [
        (length, batch, seed) for length, batch in (("128", "8"), ("256", "4")) for seed in "123"
    ]
    assert len({trial.settings for trial in found}) == 2
    assert len(chosen("seed=1,2", together=True)) == 2


def test_a_config_can_be_varied_and_values_may_hold_commas():
    found = chosen("config=mm1_5/easy_vqa,mimo_vl/easy_vqa", 'data.train=["a,b.jsonl", "c.jsonl d.jsonl"]')
    assert [trial.config for trial in found] == ["mm1_5/easy_vqa"] * 2 + ["mimo_vl/easy_vqa"] * 2
    assert found[0].words == ["--data.train", "a,b.jsonl"]
    assert found[1].words == ["--data.train", "c.jsonl", "d.jsonl"]


def test_slugs_differ_where_values_differ_only_in_signs_and_stay_short():
    assert len({trial.slug for trial in chosen("optimizer.learning_rate=0.1,0-1")}) == 2
    long = chosen(f"data.train={'a' * 80},{'a' * 80}b")
    assert len({trial.slug for trial in long}) == 2
    assert all(len(trial.slug) <= 48 for trial in long)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.learning_rate", "write field=value,value"),
        ("seed=", "a value is empty"),
        ("seed=1,2,1", "1 is given twice"),
        ("seed=[1,", "no JSON list"),
    ],
)
def test_what_is_wrong_with_a_field_is_said(text, message):
    with pytest.raises(UserError, match=message):
        Vary.parse(text)


def test_a_wrong_field_is_found_before_anything_runs(tmp_path):
    words = ["sweep", "mimo_vl/easy_vqa", "--vary", "optimizer.learning_rat=1,2", "--output_root", str(tmp_path)]
    with pytest.raises(UserError, match=r"trial optimizer\.learning_rat=1: .*did you mean --optimizer\.learning_rate"):
        sweep_command.run(words[1:])
    assert not list(tmp_path.iterdir())


def sweep_words(tmp_path: Path, rates: str = "0.3,0.6", *more: str) -> list[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    submit = f"{sys.executable} {program} {{name}} {{output_root}} {{fields}}"
    varied = ["--vary", f"optimizer.learning_rate={rates}", "seed=1,2,3"]
    where = ["--name", "rates", "--output_root", str(tmp_path / "runs")]
    return ["sweep", "mimo_vl/easy_vqa", *varied, *where, "--submit", submit, *more]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    assert cli.main(sweep_words(folder)) == 0
    return folder


def test_trials_run_once_and_the_same_command_compares_them_again(swept, capsys):
    assert cli.main(sweep_words(swept)) == 0
    assert "6 trials, 6 of them done before" in capsys.readouterr().out
    assert [path.read_text() for path in (swept / "runs").glob("rates-*/starts")] == ["x"] * 6


def test_the_table_gives_means_over_seeds_with_students_interval(swept, capsys):
    cli.main(sweep_words(swept, "0.3,0.6", "--compare"))
    printed = capsys.readouterr().out
    means = []
    for rate in (0.3, 0.6):
        runs = [np.mean([(7 * q + seed) % 10 < 10 * rate for q in range(200)]) for seed in (1, 2, 3)]
        means.append(np.mean(runs))
    rows = re.findall(r"optimizer.learning_rate=(\S+) +(\S+) +(\S+) \.\. (\S+) +(\d) runs(.*)", printed)
    assert [float(row[1]) for row in rows[:2]] == pytest.approx(means, abs=1e-4)
    assert rows[1][5].strip() == "better by 0.3 over runs"
    # less is better of the loss, the mean of the last tenth of ten lines: the last one
    losses = [float(row[1]) for row in rows[2:]]
    assert losses == pytest.approx([2.0 - 0.3 - 0.9, 2.0 - 0.6 - 0.9], abs=1e-4)


def test_students_interval_is_that_of_scipy():
    values = [0.61, 0.64, 0.70]
    found = {
        trial.slug: results.RunResult({"accuracy": value}, {})
        for trial, value in zip(chosen("seed=1,2,3"), values, strict=True)
    }
    (setting,) = results.settings_of(found, chosen("seed=1,2,3"), "accuracy")
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (setting.interval.low, setting.interval.high) == pytest.approx((low, high))
    assert setting.name == "as configured"


def test_a_difference_that_chance_explains_is_not_called_one():
    rng = np.random.default_rng(0)
    both = {("test", q, 0): float(rng.integers(2)) for q in range(100)}
    other = {**both, ("test", 0, 0): 1 - both["test", 0, 0]}
    pair = chosen("optimizer.learning_rate=1,2")
    found = {
        trial.slug: results.RunResult({"accuracy": np.mean(list(own.values()))}, {"accuracy": own})
        for trial, own in zip(pair, (both, other), strict=True)
    }
    said = results.verdict(results.settings_of(found, pair, "accuracy")[1], "accuracy")
    assert said.startswith("no difference seen over questions")


def test_runs_with_the_same_seed_are_compared_pair_by_pair():
    trials_of_both = chosen("optimizer.learning_rate=1,2", "seed=1,2,3")
    losses = [2.0, 2.4, 2.9, 1.9, 2.35, 2.7]
    found = {
        trial.slug: results.RunResult({"loss": loss}, {}) for trial, loss in zip(trials_of_both, losses, strict=True)
    }
    change = results.settings_of(found, trials_of_both, "loss")[1].change
    low, high = stats.ttest_rel(losses[3:], losses[:3]).confidence_interval(0.95)
    assert (change.interval.low, change.interval.high) == pytest.approx((low, high))
    assert change.over == "runs"


def test_the_page_shows_both_settings_and_needs_nothing_else(swept):
    page = (swept / "runs" / "rates" / "sweep.html").read_text()
    assert page.count('class="axis"') == 2 * 2  # accuracy and loss, two settings each
    assert "better by 0.3 over runs" in page
    assert "http" not in page


def test_a_failed_trial_is_named_with_its_last_words_and_the_others_are_compared(tmp_path, capsys):
    assert cli.main(sweep_words(tmp_path, "0.3,7")) == 1
    printed = capsys.readouterr().out
    assert printed.count("diverged") == 3
    assert "3 of 6 trials are not finished" in printed
    # it is tried again, and the finished ones are not
    assert cli.main(sweep_words(tmp_path, "0.3,7")) == 1
    starts = sorted(path.read_text() for path in (tmp_path / "runs").glob("rates-*/starts"))
    assert starts == ["x"] * 3 + ["xx"] * 3


def test_other_settings_under_the_same_name_are_refused(swept):
    with pytest.raises(UserError, match="give the sweep another --name"):
        sweep_command.run([*sweep_words(swept)[1:], "--steps", "7"])


@pytest.mark.slow
def test_a_signal_reaches_the_trial_that_runs_and_no_other_is_started(tmp_path):
    words = sweep_words(tmp_path, "0.3,0.6")
    words[words.index("--submit") + 1] += " --slow 1"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-m", "jvlm.cli", *words], env=environment, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not list((tmp_path / "runs").glob("rates-*/going")):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 75
    assert b"stopping" in printed
    state = json.loads((tmp_path / "runs" / "rates" / runner.STATE).read_text())["trials"]
    assert [trial["status"] for trial in state.values()] == [-signal.SIGTERM]


def test_commands_are_printed_and_nothing_runs(tmp_path, capsys):
    words = [
        "sweep",
        "mm1_5/easy_vqa",
        "--vary",
        "seed=1,2",
        "--output_root",
        str(tmp_path),
        "--dry_run",
        "--steps",
        "3",
    ]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("train ")[2] for line in lines] == [
        f"mm1_5/easy_vqa --output_root {tmp_path}/sweep --name seed-{seed} --steps 3 --seed {seed}" for seed in (1, 2)
    ]
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="the trial has not run there"):
        results.read_run(epath.Path(tmp_path))

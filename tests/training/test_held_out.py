"""Validation during training: the split by picture, exact figures, the best checkpoint, early stop."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import jvlm
from jvlm import configs
from jvlm.data.example_source import ExampleSource
from jvlm.data.mixture.examples import Examples
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.training import data_counters, runs
from jvlm.training.config import OptimizerConfig, Stage
from jvlm.training.validation import EarlyStop
from jvlm.training.validation_split import example_keys, make_split
from jvlm.weights import run_dir
from jvlm.weights.table import WeightError
from tests.support import ROOT, hf_inputs, torch_model
from tests.training import support


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return support.write_examples(tmp_path_factory.mktemp("examples"), 24)


@pytest.mark.parametrize("seed", range(5))
def test_no_key_is_on_both_sides_whatever_the_order_of_the_examples(seed):
    draw = random.Random(seed)
    keys = [frozenset(draw.choices([f"k{n}" for n in range(120)], k=draw.choice((1, 1, 1, 2)))) for _ in range(150)]
    train, held, names = make_split(keys, 0.1, seed)
    assert sorted(train + held) == list(range(len(keys)))
    assert not {k for i in train for k in keys[i]} & {k for i in held for k in keys[i]}
    assert names == {k for i in held for k in keys[i]}
    assert 1 <= len(held) <= 15
    order = draw.sample(range(len(keys)), len(keys))
    _, again, _ = make_split([keys[i] for i in order], 0.1, seed)
    assert sorted(order[i] for i in again) == held


def test_examples_that_all_share_a_picture_cannot_be_split():
    with pytest.raises(UserError, match=r"validation.split 0.5 of 4 examples cannot be held out: they are 1 groups"):
        make_split([frozenset(["a", str(n)]) for n in range(4)], 0.5, 0)


def test_a_picture_counts_by_its_bytes_and_by_its_path_and_text_by_its_content(tmp_path, examples):
    folder = examples.parent
    picture = next(path for path in sorted(folder.glob("*.png")))
    (tmp_path / "copy.png").write_bytes(picture.read_bytes())

    def line(*images, text="what?"):
        turns = [{"role": "user", "content": "<image>" * len(images) + text}, {"role": "assistant", "content": "a"}]
        return json.dumps({"messages": turns, "images": list(map(str, images))})

    path = tmp_path / "examples.jsonl"
    lines = [line(picture), line("copy.png"), line("../gone.png"), line("../gone.png"), line(text="x"), line(text="x")]
    path.write_text("\n".join([*lines, line(text="y")]) + "\n")
    data = support.experiment(tmp_path, path).data
    keys = example_keys(ExampleSource([str(path)]), data)
    assert keys[0] & keys[1], "the same bytes"
    assert keys[2] == keys[3] != keys[4] == keys[5] != keys[6]
    assert not keys[0] & keys[2]


def test_the_best_is_never_what_is_not_finite_and_of_equal_ones_the_first():
    stop = EarlyStop()
    values = (math.nan, 3.0, 3.0, math.inf, 2.95, 2.5, math.nan, -math.inf, 2.45, 2.4)
    found = [stop.update(value, step, maximise=False, min_delta=0.1) for step, value in enumerate(values)]
    assert [step for step, best in enumerate(found) if best] == [1, 4, 5, 8, 9]
    assert (stop.best, stop.step) == (2.4, 9)
    waited, counts = EarlyStop(), []
    for step, value in enumerate(values):
        waited.update(value, step, maximise=False, min_delta=0.1)
        counts.append(waited.without_gain)
    assert counts == [1, 0, 1, 2, 3, 0, 1, 2, 3, 0], "evaluations since a gain of 0.1"
    rising = EarlyStop()
    assert [rising.update(v, i, maximise=True, min_delta=0) for i, v in enumerate((0.1, 0.1, 0.2))] == [
        True,
        False,
        True,
    ]


def _lines(folder):
    lines = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def one_by_one(model, processor, path):
    """(sum of losses, tokens, correct tokens) in float64, each conversation by itself from all of its logits."""
    total, weight, right = 0.0, 0.0, 0
    for line in path.read_text().splitlines():
        example = json.loads(line)
        example["images"] = [str(path.parent / name) for name in example["images"]]
        batch = processor.pack([example])
        logits = np.asarray(model(batch), np.float64)[0, :-1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets, weights = np.asarray(batch.tokens)[0, 1:], np.asarray(batch.loss_weights)[0, 1:]
        total -= (log_p[np.arange(len(targets)), targets] * weights).sum()
        weight += weights.sum()
        right += ((logits.argmax(-1) == targets) & (weights > 0)).sum()
    return total, weight, right


def test_every_token_is_counted_once_for_each_source_and_the_best_checkpoint_stays(tmp_path, examples):
    held = []
    for name, chosen in (("a", slice(0, 5)), ("b", slice(5, 12))):
        held.append(examples.parent / f"{name}.jsonl")
        held[-1].write_text("".join(f"{line}\n" for line in examples.read_text().splitlines()[chosen]))
    options = ("--validation.data", *map(str, held), "--validation.interval_steps", "2", "--steps", "5")
    # a rate that makes it worse after the first evaluation
    rate = (
        "--optimizer.learning_rate",
        "0.05",
        "--optimizer.warmup_ratio",
        "0",
        "--checkpoint.save_interval_steps",
        "1",
    )
    result = runs.train(support.experiment(tmp_path, examples, *options, *rate, "--checkpoint.max_to_keep", "1"))
    assert result.compilations == 1
    lines = _lines(result.folder)
    assert [line["step_number"] for line in lines] == [2, 4, 5]
    sums = [one_by_one(result.model, result.processor, path) for path in held]
    for name, (total, weight, right) in zip(("a.jsonl", "b.jsonl"), sums, strict=True):
        assert lines[-1][f"eval_loss/{name}"] == pytest.approx(total / weight, rel=1e-5)
        assert lines[-1][f"eval_token_acc/{name}"] == pytest.approx(right / weight)
    total, weight, right = np.sum(sums, axis=0)
    assert lines[-1]["eval_loss"] == pytest.approx(total / weight, rel=1e-5)
    assert lines[-1]["eval_token_acc"] == pytest.approx(right / weight)

    losses = {line["step_number"]: line["eval_loss"] for line in lines}
    best = min(losses, key=losses.get)
    assert run_dir.best_step(result.folder) == best
    assert run_dir.steps(result.folder) == sorted({best, 5})
    assert result.last == 5, "without patience the run returns its last step"
    loaded, processor = jvlm.load(result.folder / "best")
    sums = np.sum([one_by_one(loaded, processor, path) for path in held], axis=0)
    assert sums[0] / sums[1] == pytest.approx(losses[best], rel=1e-5)
    again = vlm.parameters(jvlm.load(result.folder, step="best")[0])
    assert all(np.array_equal(v.get_value(), again[p].get_value()) for p, v in vlm.parameters(loaded).items())


EARLY = "--validation.split 0.25 --validation.interval_steps 2 --validation.patience 2 --validation.min_delta 10"


@pytest.mark.slow
def test_a_run_without_gain_stops_returns_its_best_and_a_restart_does_not_go_on(tmp_path, examples, capsys):
    experiment = support.experiment(tmp_path, examples, *EARLY.split(), "--steps", "20")
    result = runs.train(experiment)
    lines = _lines(result.folder)
    assert [line["step_number"] for line in lines] == [2, 4, 6]
    assert result.steps == 6
    assert result.last == min(lines, key=lambda line: line["eval_loss"])["step_number"]
    assert "stopping after step 6: 2 evaluations without a gain of 10 in eval_loss" in capsys.readouterr().out
    split = json.loads((result.folder / "validation_split.json").read_text())
    keys = example_keys(Examples.open(experiment.data), experiment.data)
    sides = [set().union(*(keys[i] for i in split[side])) for side in ("train", "validation")]
    assert sides[0].isdisjoint(sides[1])
    assert len(split["validation"]) == 6
    again = runs.train(experiment)
    assert (again.steps, again.last, again.compilations) == (6, result.last, 0)
    assert json.loads((result.folder / "validation_split.json").read_text()) == split
    with pytest.raises(UserError, match=r"begun with split 0.25, now 0.5"):
        runs.train(support.experiment(tmp_path, examples, *EARLY.split(), "--validation.split", "0.5", "--steps", "20"))


def test_a_run_without_validation_has_no_best_checkpoint(tmp_path, examples):
    result = runs.train(support.experiment(tmp_path, examples, "--steps", "1"))
    with pytest.raises(WeightError, match="has no best checkpoint"):
        jvlm.load(result.folder / "best")


@pytest.mark.slow
def test_the_loss_is_that_of_transformers_in_float64(tmp_path, examples):
    held_out = tmp_path / "held_out.jsonl"
    lines = [json.loads(line) for line in examples.read_text().splitlines()[:4]]
    for line in lines:
        line["images"] = [str(examples.parent / name) for name in line["images"]]
    held_out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--validation.data", str(held_out), "--validation.interval_steps", "2", "--steps", "2")
    result = runs.train(support.experiment(tmp_path, examples, *options))
    jvlm.save(result.model, result.processor, tmp_path / "hf")
    exported = SimpleNamespace(folder=tmp_path / "hf", config=json.loads((tmp_path / "hf/config.json").read_text()))
    model = torch_model(tmp_path / "hf").double()
    total, weight, right = 0.0, 0.0, 0
    for line in lines:
        inputs = hf_inputs(exported, {**line, "images": [Image.open(path) for path in line["images"]]})
        batch = result.processor.pack([line])
        ids = inputs["input_ids"].numpy()[0]
        assert np.array_equal(batch.tokens[0, : len(ids)], ids)
        with torch.no_grad():
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].double()
            logits = model(**inputs).logits[0, :-1].double()
        targets, weights = torch.from_numpy(ids[1:]), np.asarray(batch.loss_weights[0, 1 : len(ids)])
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()
        total, weight = total + (losses * weights).sum(), weight + weights.sum()
        right += ((logits.argmax(-1) == targets).numpy() & (weights > 0)).sum()
    found = _lines(result.folder)[-1]
    assert found["eval_loss"] == pytest.approx(total / weight, rel=1e-5)
    assert found["eval_token_acc"] == pytest.approx(right / weight)


@pytest.mark.slow
def test_what_is_held_out_of_a_run_is_held_out_of_its_stages(tmp_path, examples, monkeypatch):
    seen = []
    add = data_counters.DataCounters.add

    def record(counters, packed, step):
        seen.extend((counters.path.parent.name, o.number) for sequence in packed.origins for o in sequence)
        add(counters, packed, step)

    monkeypatch.setattr(data_counters.DataCounters, "add", record)
    data = support.experiment(tmp_path, examples).data
    stage = Stage("warm-up", data, OptimizerConfig(encoder_lr=0.0), steps=12)
    options = ("--validation.split", "0.25", "--validation.interval_steps", "4", "--steps", "12")
    result = runs.train(support.experiment(tmp_path, examples, *options, stages=(stage,)))
    split = json.loads((result.folder / "validation_split.json").read_text())
    trained = {index + 1 for index in split["train"]}
    for run in ("warm-up", "run"):
        numbers = {number for name, number in seen if name == run}
        assert numbers
        assert numbers <= trained, "an example that is held out was learnt"
    assert [line["step_number"] for line in _lines(result.folder)] == [4, 8, 12]
    assert _lines(result.folder / "stages" / "warm-up") == []


CONFIG = """
from pathlib import Path
from tests.training import support
def get_config():
    options = "--steps 12 --export.enabled False --validation.interval_steps 2 --validation.split 0.25"
    patience = "--validation.patience 4 --checkpoint.save_interval_steps 3 --checkpoint.max_to_keep 1"
    return support.experiment(Path({folder!r}), Path({examples!r}), *options.split(), *patience.split())
"""


@pytest.mark.slow
def test_kill_9_changes_no_evaluation_nor_the_best_nor_what_patience_has_counted(tmp_path, examples):
    folders = {name: tmp_path / name for name in ("whole", "killed")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "config.py").write_text(CONFIG.format(folder=str(folder), examples=str(examples)))
    experiments = {name: configs.load(str(folder / "config.py")) for name, folder in folders.items()}
    runs.train(experiments["whole"])
    run = folders["killed"] / "run"
    command = [sys.executable, "-m", "jvlm.cli", "train", str(folders["killed"] / "config.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    deadline = time.monotonic() + 300
    while not (run / "logging.jsonl").is_file() or len(_lines(run)) < 2:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(_lines(run)) < 6
    runs.train(experiments["killed"])  # goes on in this process
    whole, killed = ([{**line, "eval_seconds": 0} for line in _lines(f / "run")] for f in folders.values())
    numbers = [[{k: v for k, v in line.items() if k.startswith("eval_")} for line in x] for x in (whole, killed)]
    assert numbers[0] == numbers[1]
    assert run_dir.best_step(run) == run_dir.best_step(tmp_path / "whole" / "run")
    one, other = (vlm.parameters(jvlm.load(f / "run" / "best")[0]) for f in (tmp_path / "whole", tmp_path / "killed"))
    assert all(np.array_equal(v.get_value(), other[p].get_value()) for p, v in one.items())
    split = "validation_split.json"
    assert (run / split).read_bytes() == (tmp_path / "whole" / "run" / split).read_bytes()

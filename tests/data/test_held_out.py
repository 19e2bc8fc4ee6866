"""What evaluation and validation data share with training data is said by a check, a page and a run's start."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image

from jvlm.data import survey
from jvlm.data.check import check
from jvlm.data.config import DataConfig
from jvlm.data.prepare.held_out import HeldOut, HeldOutFiles
from jvlm.training import resolve, starting_model
from jvlm.training.config import EvaluationConfig, ValidationConfig
from tests.training import support

WORDS = "which animal stands behind the barn near the old river in this picture".split()


def _chat(question: str, answer: str, *images: str) -> dict:
    said = [("user", "<image>" * len(images) + question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in said], "images": list(images)}


def _write(path: Path, examples: list[dict]) -> str:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


def _image(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(path)


def _sentence(number: int) -> str:
    return " ".join(f"{word}{number}" for word in WORDS)


def _files(folder: Path) -> tuple[str, str]:
    """Questions 0 and 1 are in the training data, one in other letters; the image of 2 is, under another name."""
    for name, seed in (("train", 0), ("other", 1), ("copy", 0), ("own", 2)):
        _image(folder / f"{name}.png", seed)
    train = [_chat(_sentence(number), "a cow") for number in (0, 0, 1, 10, 11)]
    train += [_chat("is it?", "yes", "train.png"), _chat("is it?", "no", "other.png", "train.png")]
    train += [_chat(_sentence(2), "yes", "missing.png")]
    held_out = [
        _chat(f"{_sentence(0).upper()}?!", "a horse"),
        _chat(f"Say {_sentence(1)}", "no"),
        _chat("red?", "no", "copy.png"),
        _chat("red?", "no", "own.png"),
        _chat("red?", "no", "gone.png"),
        _chat(_sentence(2), "no"),
    ]
    return _write(folder / "train.jsonl", train), _write(folder / "exam.jsonl", held_out)


def test_a_check_counts_held_out_examples_and_those_that_share_with_them(tmp_path):
    train, exam = _files(tmp_path)
    held_out = HeldOut({"exam": HeldOutFiles((exam,))})
    (line,) = check([train], None, held_out=held_out).held_out
    # of the example without its image nothing is said: it is not trained on
    assert line.startswith(
        "exam: of 6 held-out examples 2 share a run of words with 3 of these, 1 an image with 2; 1 cannot be read; "
    )
    assert f"'{_sentence(0)}"[:40] in line
    assert f"exam.jsonl, line 3 in {train}, line 6" in line
    held_out = HeldOut({"exam": HeldOutFiles((exam,)), "gone": HeldOutFiles(("gone.jsonl",))})
    text = check([train], None, held_out=held_out).text()
    assert line in text
    assert "gone: what the examples share with it is not known: no data file matches 'gone.jsonl'" in text


def test_many_threads_find_what_one_finds(tmp_path):
    train = _write(tmp_path / "train.jsonl", [_chat(_sentence(number), "a cow") for number in range(300)])
    exam = _write(tmp_path / "exam.jsonl", [_chat(_sentence(number), "a cow") for number in range(0, 400, 2)])
    for _ in range(3):
        found = check([train], None, DataConfig(read_threads=16), held_out=HeldOut({"exam": HeldOutFiles((exam,))}))
        assert "of 200 held-out examples 150 share a run of words with 150 of these" in found.held_out[0]


def test_a_run_says_at_its_start_what_its_sample_shares_and_opens_no_image_for_it(tmp_path):
    train, exam = _files(tmp_path)
    experiment = dataclasses.replace(
        support.experiment(tmp_path, support.write_examples(tmp_path)),
        evaluation=EvaluationConfig((exam,)),
        validation=ValidationConfig((exam,)),
    )
    processor = starting_model.start_model(experiment)[1]
    data = dataclasses.replace(
        experiment.data, train=(train,), seq_len=512, max_patches=1024, on_bad_example="skip", max_too_long_fraction=1.0
    )
    held_out = resolve.held_out(experiment, sample=True)
    text = survey.take(processor, data, seed=0, count=64, held_out=held_out).text()
    for name in ("evaluation.data", "validation.data"):
        assert f"{name}: 3 of 8 training examples looked at share a run of words with it" in text
    assert not any(held_out.unreadable.values())
    assert "share a run" not in survey.take(processor, data, seed=0, count=64).text()
    assert (
        resolve.held_out(dataclasses.replace(experiment, evaluation=EvaluationConfig(), validation=ValidationConfig()))
        is None
    )

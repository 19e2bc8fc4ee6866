"""Runs that follow one another, task by task: scores with intervals, what the last one changed, the page."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jvlm import cli
from jvlm.data.readers.array_record import write_shard
from jvlm.errors import UserError
from jvlm.scoring.statistics import Comparison, Interval
from jvlm.sweep import results, tasks
from tests.support import picture

ASKED = 60


def example(number: int) -> dict:
    file = io.BytesIO()
    picture(40, 36, number).save(file, "PNG")
    messages = [{"role": "user", "content": "<image>how many?"}, {"role": "assistant", "content": str(number)}]
    return {"messages": messages, "images": [{"bytes": file.getvalue(), "path": None}]}


def line(file: Path, number: int, score: float, **more) -> dict:
    said = {"question": "how many?", "expected": "3", "response": "3" if score else "4"}
    return {"file": str(file), "number": number, "turn": 0, **said, "score": score, **more}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Three runs: counting gains from the second to the third, places stay, and the first was asked less."""
    root = tmp_path_factory.mktemp("runs")
    counting, places = root / "test_counting.arrayrecord", root / "test_where.arrayrecord"
    write_shard(counting, map(example, range(ASKED)))
    write_shard(places, map(example, range(ASKED)))
    folders = []
    for name, every in (("one", 4), ("two", 3), ("three", 2)):
        folder = root / name
        folder.mkdir()
        lines = [line(counting, n + 1, float(n % 6 < 6 - every)) for n in range(ASKED if name != "one" else 40)]
        box = {"boxes": [[4, 5, 30, 31]], "predicted": [[6, 7, 28, 29]], "parsed": True}
        lines += [line(places, n + 1, 0.25 + 0.5 * (n % 2), **box) for n in range(ASKED)]
        (folder / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        log = [{"step_number": step, "loss": 3 / step} for step in range(1, 9)]
        log.append({"step_number": 8, "eval_loss": 1.5, "eval_loss/test_counting.arrayrecord": 1.25})
        (folder / "logging.jsonl").write_text("".join(json.dumps(one) + "\n" for one in log))
        (folder / "scores.json").write_text(json.dumps({"training_seconds": 75.0}))
        folders.append(folder)
    return folders


def wilson(right: int, total: int) -> tuple[float, float]:
    found = stats.binomtest(right, total).proportion_ci(method="wilson")
    return found.low, found.high


def test_a_task_is_a_file_and_its_score_has_wilsons_interval(runs):
    one, two, _ = map(tasks.read, runs)
    assert tasks.tasks_of([one, two]) == ["counting", "where"]
    found = tasks.score(two, "counting")
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx(wilson(ASKED // 2, ASKED))
    assert tasks.score(one, "ocr") is None
    assert one.losses == {"counting": 1.25}


def test_a_change_is_that_of_the_questions_that_both_runs_were_asked(runs):
    one, two, three = map(tasks.read, runs)
    gained = tasks.change(two, three, "counting")
    assert gained.difference.value == pytest.approx(1 / 6)
    assert tasks.verdict(gained) == "gained"
    assert tasks.verdict(tasks.change(three, two, "counting")) == "lost"
    same = tasks.change(two, three, "where")
    assert same.difference.value == 0
    assert tasks.verdict(same) == "the same"
    unsure = Comparison(Interval(0.01, -0.02, 0.04), 0.5, 0.043, 3)
    assert tasks.verdict(unsure) == "no change seen (one of 4.3 would show)"
    both = np.arange(40)
    expected = (both % 6 < 3).mean() - (both % 6 < 2).mean()
    assert tasks.change(one, two, "counting").difference.value == pytest.approx(expected)


def test_the_command_prints_tables_and_writes_a_page_with_places_of_both_runs(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["report", *map(str, runs), "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| counting \| 60 \| 3\d\.\d .* \| 50\.0 \[.*\] \| 66\.7 \[", printed)
    assert re.search(r"\| counting \| \+16\.7 \[.*\] \| gained \|", printed)
    text = page.read_text()
    assert "What three changed" in text
    assert text.count("<image href=") == 6  # three questions of each task
    # the reference, the run before in blue and the last one in red, in pixels
    assert 'x="4" y="5" width="26" height="26" fill="none" stroke="#16803c"' in text
    for colour in ("#2456d6", "#c62828"):
        assert f'x="6" y="7" width="22" height="22" fill="none" stroke="{colour}"' in text
    assert re.search(r">1m\s?15s<", text)  # of training


def test_a_run_that_is_not_finished_and_two_files_of_one_task_are_refused(runs, tmp_path):
    with pytest.raises(UserError, match=r"neither answers\.jsonl nor logging\.jsonl"):
        tasks.read(tmp_path)
    twice = [line(Path("a/test_ocr.arrayrecord"), 1, 1.0), line(Path("b/ocr.jsonl"), 1, 1.0)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in twice))
    with pytest.raises(UserError, match=r"would both be the task ocr"):
        tasks.read(tmp_path)


def test_a_run_that_was_asked_nothing_has_its_held_out_losses(runs, tmp_path, capsys):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "logging.jsonl").write_text((runs[0] / "logging.jsonl").read_text())
    first = tasks.read(tmp_path / "first")
    assert (dict(first.answers), first.losses, first.seconds) == ({}, {"counting": 1.25}, None)
    page = tmp_path / "page.html"
    assert cli.main(["report", str(first.folder), str(runs[0]), "--output", str(page)]) == 0
    assert re.search(r"\| counting \| 40 \|  \| 35\.0 \[", capsys.readouterr().out)
    assert "What one changed" not in page.read_text()


def test_sweeps_have_the_score_of_each_task_where_there_are_several(runs):
    from etils import epath

    found = results.read_run(epath.Path(runs[2]))
    assert found.values["score/counting"] == found.values["accuracy"] == pytest.approx(2 / 3)
    assert found.values["score/where"] == found.values["mean_iou"] == 0.5
    assert results.metrics_of({"a": found})[-2:] == ["score/counting", "score/where"]

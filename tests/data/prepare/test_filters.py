"""Limits leave out what they say; histograms count everything; the language is found."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from jvlm import cli
from jvlm.data.example_source import ExampleSource
from jvlm.data.prepare.filters import Limits, filter_examples, histograms, repetition
from jvlm.errors import UserError
from tests.data.prepare.conftest import chat

TEXTS = [
    "The museum opens at nine in the morning and closes at five in the afternoon.",
    "Das Museum öffnet morgens um neun Uhr und schließt am Nachmittag um fünf.",
    "Le musée ouvre à neuf heures du matin et ferme à cinq heures de l'après-midi.",
    "buy now buy now buy now buy now buy now buy now buy now",
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filters")
    for name, size in {"small": (20, 90), "wide": (400, 60), "good": (120, 80)}.items():
        Image.new("RGB", size).save(folder / f"{name}.png")
    rows = [
        *(chat("?", one) for one in TEXTS),
        chat("What?", "A.", ["small.png"]),
        chat("What?", "A.", ["wide.png", "good.png"]),
        chat("What?", "A.", ["good.png"]),
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dropped(output) -> dict[int, str]:
    lines = map(json.loads, (output / "found.jsonl").read_text().splitlines())
    return {line["number"]: line["reason"] for line in lines}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(min_side=28), {5: "min_side"}),
        (Limits(max_side=390), {6: "max_side"}),
        (Limits(max_aspect=4), {5: "max_aspect", 6: "max_aspect"}),
        (Limits(min_words=10, max_words=16), {3: "max_words", 5: "min_words", 6: "min_words", 7: "min_words"}),
        (Limits(max_repetition=0.5), {4: "max_repetition"}),
        (Limits(languages=("en",), min_characters=60), None),
    ],
)
def test_each_limit_leaves_out_what_is_beyond_it(rows, tmp_path, limits, expected):
    filter_examples([str(rows)], tmp_path, limits)
    found = dropped(tmp_path)
    if expected is None:
        assert found[2] == found[3] == "languages"
        assert 1 not in found
        return
    assert found == expected


def test_the_share_of_the_highest_perplexity_is_dropped_and_nothing_is_measured_twice(rows, tmp_path, capsys):
    calls = []

    def perplexity(texts):
        calls.append(len(texts))
        return [float(len(text)) for text in texts]

    settings = {"perplexity": perplexity, "perplexity_of": "length"}
    filter_examples([str(rows)], tmp_path, **settings, on_histograms=print)
    assert "perplexity (7 examples" in capsys.readouterr().out
    done = filter_examples([str(rows)], tmp_path, Limits(max_perplexity_share=0.3), drop=True, **settings)
    assert calls == [7]
    longest = sorted(range(4), key=lambda i: -len(TEXTS[i]))[:2]
    assert set(dropped(tmp_path)) == {i + 1 for i in longest}
    assert (done.read, done.written, done.dropped) == (7, 5, 2)
    assert len(ExampleSource([f"{tmp_path}/*.arrayrecord"])) == 5


def test_histograms_count_every_value_and_mark_what_a_limit_cuts():
    rng = np.random.default_rng(0)
    for values in (rng.normal(50, 9, 500), rng.lognormal(1, 2, 500)):
        lines = histograms([{"words": float(v)} for v in values], Limits(max_words=60)).splitlines()
        counts = [int(line.split()[-2 if line.endswith("<") else -1].replace(",", "")) for line in lines[1:]]
        assert sum(counts) == 500
        beyond = [count for line, count in zip(lines[1:], counts, strict=True) if line.endswith("<")]
        assert sum(beyond) >= (values > 60).sum() > 0
        assert "at most 60" in lines[0]


def test_repetition_is_the_share_of_runs_of_three_words_that_come_again():
    assert repetition("a b c d e".split()) == 0
    assert repetition("a b c a b c".split()) == 0.5  # abc, bca, cab, abc
    assert repetition([]) == 0


def test_the_command_shows_histograms_first_and_needs_a_limit_to_drop(rows, tmp_path, capsys):
    command = ["data", "filter", str(rows), "--output", str(tmp_path)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "shorter_side (3 examples" in out
    assert "nothing was dropped" in out
    assert cli.main([*command, "--drop"]) == 2
    assert "give a limit" in capsys.readouterr().err
    assert cli.main([*command, "--min_perplexity", "2"]) == 2
    assert "--model" in capsys.readouterr().err
    assert cli.main([*command, "--drop", "--min_side", "28", "--max_aspect", "3"]) == 0
    assert "5 written and 2 dropped" in capsys.readouterr().out


def test_a_share_of_the_perplexity_must_be_a_share():
    with pytest.raises(UserError, match="between 0 and 1"):
        Limits(max_perplexity_share=math.nan)

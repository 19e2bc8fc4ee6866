"""The papers in miniature: what is drawn is what is asked for, splits share nothing, ablations are experiments."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jvlm import configs
from jvlm.data.readers.array_record import SHARD_SUFFIX
from jvlm.models import vlm
from jvlm.scoring.statistics import Interval
from jvlm.sweep import trials
from jvlm.sweep.results import Change, Setting
from tools.make_easy_vqa import find_shape
from tools.mini import examples, make_data, papers
from tools.mini.drawing import DIRECTIONS


def pixels(file: dict) -> np.ndarray:
    with Image.open(io.BytesIO(file["bytes"])) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


def of_ground(image: np.ndarray) -> np.ndarray:
    """Where a picture is not its ground, which is the colour of its first corner."""
    return np.abs(image - image[0, 0]).max(-1) > 25


def answers(example: dict) -> list[str]:
    return [message["content"] for message in example["messages"][1::2]]


@pytest.mark.parametrize("seed", range(40))
def test_a_number_is_that_of_the_separate_parts_of_the_picture(seed):
    example = examples.counting(np.random.default_rng(seed))
    image = pixels(example["images"][0])
    found = ndimage.label(of_ground(image))[1]
    if example["messages"][0]["content"].endswith("how many shapes are there?"):
        assert answers(example) == [str(found)]
    else:
        assert int(answers(example)[0]) <= found


@pytest.mark.parametrize("seed", range(40))
def test_a_box_holds_the_shape_of_its_colour_and_kind(seed):
    example = examples.grounding(np.random.default_rng(seed), count=1)
    with Image.open(io.BytesIO(example["images"][0]["bytes"])) as opened:
        (colour, kind), box = find_shape(opened)
    assert re.search(r"where is the (.*)\?", example["messages"][0]["content"])[1] == f"{colour} {kind}"
    assert np.abs(np.subtract(example["objects"]["bbox"][0], box)).max() <= 2


@pytest.mark.parametrize("seed", range(12))
def test_a_film_goes_the_ways_that_are_its_answer(seed):
    example = examples.long_video(np.random.default_rng(seed))
    middles = np.array(
        [ndimage.center_of_mass(of_ground(pixels(frame)))[::-1] for frame in example["videos"][0]["video"]]
    )
    ways = []
    for part in np.split(middles, 3):
        step = part[-1] - part[0]
        ways.append(max(DIRECTIONS, key=lambda name: step @ np.asarray(DIRECTIONS[name])))
    assert answers(example) == [", then ".join(ways)]


@pytest.mark.parametrize("make", [examples.sums, examples.reasoning, examples.long_reasoning])
def test_a_sum_and_each_of_its_steps_are_right(make):
    for seed in range(50):
        example = make(np.random.default_rng(seed))
        question, reply = (message["content"] for message in example["messages"])
        thought, said = re.fullmatch(r"<think>(.*)</think>(\d+)", reply).groups()
        assert int(said) == sum(map(int, re.findall(r"\d+", question))) < 100
        assert all(int(a) + int(b) == int(c) for a, b, c in re.findall(r"(\d+) \+ (\d+) = (\d+)\.", thought))


def test_a_list_gives_the_number_of_the_word_that_is_asked_for():
    for seed in range(50):
        example = examples.long_text(np.random.default_rng(seed))
        shown, word = re.fullmatch(r"(.*)\. what is (\w+)\?", example["messages"][0]["content"]).groups()
        assert answers(example) == [dict(pair.split() for pair in shown.split(", "))[word]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data.make(folder, share=0.01)
    return folder


def test_the_same_seed_makes_the_same_shards(made, tmp_path):
    for kind in ("grounding", "long_documents", "video"):
        again = make_data.drawn(0, kind, "test", 5, set())
        assert list(make_data.shard(made / f"test_{kind}{SHARD_SUFFIX}")) == list(again)


def test_no_picture_film_or_question_of_a_test_is_trained_on_or_chosen_by(made):
    files = {
        split: [make_data.identity(one) for path in made.glob(f"{split}_*") for one in make_data.shard(path)]
        for split in ("train", "validation", "test")
    }
    assert min(map(len, files.values())) > 100
    train, validation, test = (set().union(*marks) for marks in files.values())
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_what_is_described_is_so():
    checked = 0
    for seed in range(40):
        example = examples.description(np.random.default_rng(seed))
        ((reply,), image) = answers(example), pixels(example["images"][0])
        parts = ndimage.find_objects(ndimage.label(of_ground(image))[0])
        assert reply.startswith(f"there are {len(parts)} shapes in the picture. from left to right, the first is a ")
        parts.sort(key=lambda part: part[1].start)
        tops, lefts = ([part[axis].start for part in parts] for axis in (0, 1))
        areas = [(part[0].stop - part[0].start) * (part[1].stop - part[1].start) for part in parts]
        if min(np.diff(lefts)) <= 3 or min(np.diff(sorted(tops))) <= 3 or sorted(areas)[-2] > 0.8 * max(areas):
            continue  # edges are soft, and corners of triangles hardly seen
        names = re.findall(r"is a (\w+ \w+)[,.]", reply)
        highest, largest = (re.search(rf"the (\w+ \w+) is the {word}", reply)[1] for word in ("highest", "largest"))
        assert names.index(highest) == np.argmin(tops)
        assert names.index(largest) == np.argmax(areas)
        checked += 1
    assert checked >= 10


CONFIGS = [path.stem for path in sorted((configs.FOLDER / "mini").glob("*.py"))]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_starts_from_the_stage_before_and_trains_on_what_is_made(name, made):
    experiment = configs.load(f"mini/{name}")
    names = {path.name for path in made.glob(f"*{SHARD_SUFFIX}")}
    files = [*experiment.data.files, *experiment.evaluation.data, *experiment.validation.data]
    assert {file.partition("#")[0].rpartition("/")[2] for file in files} <= names
    if experiment.init_from is not None:
        before = experiment.init_from.removeprefix("runs/").removesuffix("/hf")
        assert before in {configs.load(f"mini/{other}").name for other in CONFIGS}
    else:
        assert experiment.model is not None


def test_the_two_architectures_of_idefics2_have_equal_parameters():
    counts = [
        sum(vlm.parameter_counts(vlm.abstract(configs.load(f"mini/idefics2_{name}").model)).values())
        for name in ("from_start", "cross_attention")
    ]
    assert counts[1] == pytest.approx(counts[0], rel=1e-3)


ABLATIONS = [(paper, one) for paper, (_, every) in papers.PAPERS.items() for one in every]


@pytest.mark.parametrize(("paper", "ablation"), ABLATIONS, ids=[f"{p}-{a.name}" for p, a in ABLATIONS])
def test_every_trial_of_an_ablation_is_an_experiment(paper, ablation):
    sweep, chosen = papers.sweep_of(paper, ablation, [1], ())
    trials.check(chosen, sweep.fields)
    assert max(finding.other for finding in ablation.findings) < len({trial.settings for trial in chosen})


@pytest.mark.parametrize(
    ("expected", "low", "high", "said"),
    [
        ("better", 0.02, 0.2, "seen"),
        ("better", -0.2, -0.02, "the opposite is seen"),
        ("better", -0.1, 0.1, "not seen at this size"),
        ("worse", -0.2, -0.02, "seen"),
        ("equal", -0.1, 0.1, "no difference is seen, as in the paper"),
        ("equal", 0.02, 0.2, "not seen: better"),
    ],
)
def test_a_finding_is_seen_where_the_interval_of_the_difference_says_so(expected, low, high, said):
    change = Change(Interval((low + high) / 2, low, high), 0.05, "runs")
    settings = [Setting((), 3, 0.5, None), Setting((), 3, 0.6, None, change)]
    assert papers.Finding("", "score/ocr", 1, expected).verdict(settings).startswith(said)
    assert papers.Finding("", "score/ocr", 2, expected).verdict(settings) == "not run"


def test_nothing_is_said_of_what_no_setting_has_learnt():
    change = Change(Interval(0.02, 0.01, 0.03), 0.01, "questions")
    settings = [Setting((), 1, 0.01, None), Setting((), 1, 0.03, None, change)]
    assert papers.Finding("", "score/ocr", 1, "better").verdict(settings).startswith("cannot be told")


def test_losses_of_one_run_each_are_told_without_a_verdict():
    settings = [Setting((), 1, 1.5, None), Setting((), 1, 2.0, None)]
    said = papers.Finding("", "eval_loss", 1, "worse").verdict(settings)
    assert said == "cannot be told from one run of each: 2.000 against 1.500"

"""`jvlm data check` says what training would do with the data, briefly."""

from __future__ import annotations

import dataclasses
import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jvlm import cli
from jvlm.data import pipeline
from jvlm.data.check import check
from jvlm.data.config import DataConfig
from jvlm.data.errors import ExampleError, Rejected
from jvlm.data.processor import Processor
from jvlm.data.rejections import Rejections
from tests.training import support


def _chat(*said: str, **fields) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)], **fields}


def _unlearnt(example: dict, **loss) -> dict:
    example["messages"][-1] |= loss
    return example


# a line of JSONL -> what training says of it; None where it is used
EXAMPLES = {
    "a chat": (_chat("is there a red shape?", "no"), None),
    "a picture": (_chat("<image>what color?", "red", images=["red.png"]), None),
    "an unknown column": (_chat("what color?", "red", colour="red"), None),
    "no assistant turn": (_chat("what color?"), "no assistant turn to learn from"),
    "loss false": (_unlearnt(_chat("what color?", "red"), loss=False), "no assistant turn to learn from"),
    "loss 0": (_unlearnt(_chat("what color?", "red"), loss=0), "no assistant turn to learn from"),
    "weight 0": (_unlearnt(_chat("what color?", "red"), loss_scale=0), "no assistant turn to learn from"),
    "too many tokens": (_chat("what color? " * 60, "red"), "tokens do not fit 192"),
    "several turns, the last too much": (_chat("what color?", "red", "is it a circle? " * 60, "yes"), "do not fit 192"),
    "too many patches": (_chat("<image>" * 9, "red", images=["large.png"] * 9), "patches do not fit 192"),
    "a missing picture": (_chat("<image>what color?", "red", images=["gone.png"]), "file not found"),
    "a damaged picture": (_chat("<image>what color?", "red", images=["cut.png"]), "cannot be decoded"),
    "a thin picture": (_chat("<image>what color?", "red", images=["thin.png"]), "aspect ratio"),
    "a picture too few": (_chat("<image>what color?", "red"), "1 <image> tags but 0 entries"),
    "a box outside": (
        _chat("<image>where?", "<bbox>", images=["red.png"], objects={"bbox": [[0, 0, 900, 900]]}),
        "outside the image",
    ),
    "an unknown role": ({"messages": [{"role": "human", "content": "x"}]}, "unknown role"),
    "a list": ([1], "not an object"),
    "no JSON": ("{", "not JSON"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[Path, Processor, DataConfig]:
    """(a JSONL of every example above, a processor, examples of 192 tokens and patches)."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("check")
    Image.new("RGB", (32, 48), (255, 0, 0)).save(folder / "red.png")
    Image.new("RGB", (210, 150), (0, 0, 255)).save(folder / "large.png")
    Image.new("RGB", (3000, 4)).save(folder / "thin.png")
    (folder / "cut.png").write_bytes((folder / "large.png").read_bytes()[:60])
    examples = folder / "examples.jsonl"
    lines = [example if isinstance(example, str) else json.dumps(example) for example, _ in EXAMPLES.values()]
    examples.write_text("\n".join(lines) + "\n")
    experiment = support.experiment(folder, examples)
    tokenizer = AutoTokenizer.from_pretrained(str(experiment.tokenizer), local_files_only=True)
    data = dataclasses.replace(experiment.data, train=(str(examples),), on_bad_example="skip", max_bad_fraction=1.0)
    data = dataclasses.replace(data, max_too_long_fraction=1.0)
    return examples, Processor(tokenizer, experiment.model, experiment.processor), data


def test_each_example_is_judged_as_it_should_be(place):
    examples, processor, data = place
    report = check([str(examples)], processor, data)
    said = {error.origin.number: error for error in report.rejected}
    for number, (name, (_, expected)) in enumerate(EXAMPLES.items(), 1):
        if expected is None:
            assert number not in said, name
        else:
            assert expected in said[number].problem, name
            assert str(examples) in str(said[number])
    assert report.examples == len(EXAMPLES) == report.usable + len(report.rejected)


@pytest.mark.parametrize("policy", ["drop", "truncate", "shrink"])
def test_what_is_rejected_is_what_training_leaves_out(place, policy):
    examples, processor, data = place
    data = dataclasses.replace(data, on_too_long=policy)
    batches = list(pipeline.training_data(processor, data, seed=0, epochs=1)[0])
    left_out = {(example.number, example.field, example.reason) for batch in batches for example in batch.rejected}
    used = sum(batch.conversations for batch in batches)
    report = check([str(examples)], processor, data)
    assert {(e.origin.number, e.field, e.problem) for e in report.rejected} == left_out
    assert (report.usable, report.examples) == (used, used + len(left_out))
    assert report.changed == {"drop": 0, "truncate": 1, "shrink": 1}[policy]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ["13 bad: left out (data.on_bad_example skip)", "2 too long: left out (data.on_too_long drop)"]),
        ({"on_bad_example": "error"}, ["13 bad: training stops at the first one (data.on_bad_example error)"]),
        ({"on_too_long": "error"}, ["2 too long: training stops at the first one (data.on_too_long error)"]),
        (
            {"max_bad_fraction": 0.1},
            ["13 bad: left out (data.on_bad_example skip); more than data.max_bad_fraction 0.1"],
        ),
        ({"max_too_long_fraction": 0.01}, ["; more than data.max_too_long_fraction 0.01, so training stops"]),
        ({"on_too_long": "truncate"}, ["1 too long: lose turns at their end (data.on_too_long truncate)"]),
        ({"on_too_long": "shrink"}, ["1 too long: have their images shrunk (data.on_too_long shrink)"]),
    ],
)
def test_what_training_would_do_about_it_is_said(place, changes, said):
    examples, processor, data = place
    text = check([str(examples)], processor, dataclasses.replace(data, **changes)).text()
    bad = sum(1 for _, expected in EXAMPLES.values() if expected and "do not fit" not in expected)
    too_long = sum(1 for _, expected in EXAMPLES.values() if expected and "do not fit" in expected)
    for line in said:
        assert line.replace("13 bad", f"{bad} bad").replace("2 too long", f"{too_long} too long") in text


def test_without_a_processor_all_but_the_sizes_is_checked(place):
    examples, _, _ = place
    report = check([str(examples)], None)
    seen = {list(EXAMPLES)[error.origin.number - 1] for error in report.rejected}
    unseen = {"too many tokens", "several turns, the last too much", "too many patches"}
    unseen |= {"a thin picture", "a box outside"}
    assert seen == {name for name, (_, expected) in EXAMPLES.items() if expected} - unseen
    assert "tokens, image limits and the sizes of a sequence were not checked" in report.text()


def _write(path: Path, examples: list) -> str:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


@pytest.mark.parametrize(
    "fault",
    [
        lambda n: _chat("<image>", "red", images=[f"pictures of the {n}th/red {n}.png"]),
        lambda n: _chat("<image>" * (n % 3 + 2), "red", images=["red.png"]),
        lambda n: _chat("hi", "red", "hi", "red", messages=[{"role": f"r{n}", "content": "x"}] * (n % 4 + 1)),
        lambda n: _chat(*["hi", "red"] * (n % 5), "hi", objects={"bbox": [[n, 3, 1, 1.5 * n]]}),
        lambda n: _chat("hi" * n, "x", images=[f"https://example.org/{n}.png"]),
        lambda n: {"conversations": n},
        lambda n: _chat(f"number {n}"),
        lambda n: [n],
    ],
)
def test_one_fault_in_many_examples_is_one_line_with_a_count_and_three_places(tmp_path, fault):
    path = _write(tmp_path / "examples.jsonl", [fault(n) for n in range(1, 206)])
    report = check([path], None)
    (line,) = re.findall(r"^  205 x .*$", report.text(), re.MULTILINE)
    assert line.startswith(f"  205 x {path}, line 1, field")
    assert f"at {path}:1, {path}:2, {path}:3 and 202 more" in report.text()
    assert len(report.text().splitlines()) < 10
    assert (report.usable, report.examples, len(report.rejected)) == (0, 205, 205)


def test_different_faults_stay_apart_and_many_are_cut():
    examples = [Rejected("a.jsonl", n, f"f{chr(65 + n % 26)}{chr(65 + n // 26)}", "wrong") for n in range(60)]
    rejections = Rejections([*examples, examples[7]])
    lines = rejections.lines()
    assert lines[0].startswith("  2 x a.jsonl, line 7, ")
    assert len(lines) == 2 * 20 + 1
    assert lines[-1] == "  40 x 40 other faults"
    assert rejections.count() == 61


def test_sizes_are_those_that_the_tokenizer_gives(tmp_path, place):
    _, processor, data = place
    examples = [_chat("what color? " * n, "red " * n) for n in range(1, 11)]
    path = _write(tmp_path / "examples.jsonl", examples)
    report = check([path], processor, dataclasses.replace(data, seq_len=4096))
    template = processor.tokenizer.apply_chat_template
    expected = [
        len(processor.tokenizer(template(example["messages"], tokenize=False))["input_ids"]) for example in examples
    ]
    assert list(report.tokens) == expected
    answers = [len(processor.tokenizer("red " * n + "<|im_end|>")["input_ids"]) for n in range(1, 11)]
    assert report.loss_tokens == sum(answers)
    ordered = sorted(expected)
    marks = (ordered[0], ordered[5], ordered[-1], ordered[-1], sum(expected))
    assert re.search(r"tokens\s+" + r"\s+".join(f"{m:,}" for m in marks) + "$", report.text(), re.MULTILINE)
    assert f"loss tokens: {100 * sum(answers) / sum(expected):.1f} % of the tokens" in report.text()


def test_the_suggested_sizes_hold_every_example(place):
    examples, processor, data = place
    report = check([str(examples)], processor, data)
    tokens, patches = map(int, re.search(r"seq_len (\d+) and data.max_patches (\d+) hold", report.text()).groups())
    again = check([str(examples)], processor, dataclasses.replace(data, seq_len=tokens, max_patches=patches))
    assert not [e for e in again.rejected if "do not fit" in e.problem]
    assert max(report.tokens) <= tokens


def test_sizes_left_to_the_data_are_chosen_as_training_does(place):
    examples, processor, data = place
    auto = dataclasses.replace(data, seq_len="auto", max_patches="auto")
    report = check([str(examples)], processor, auto)
    assert not [e for e in report.rejected if "do not fit" in e.problem]
    assert report.config.seq_len >= max(report.tokens)


def test_unknown_columns_are_listed_once_a_file_with_a_hint(tmp_path):
    a = _write(tmp_path / "a.jsonl", [_chat("hi", "red", imagess=["x.png"], note=n) for n in range(30)])
    b = _write(tmp_path / "b.jsonl", [_chat("hi", "red"), _chat("hi", "red", note=1)])
    report = check([a, b], None)
    assert (report.usable, report.examples) == (32, 32)
    text = report.text()
    assert re.search(rf"{a}: column 'imagess' is not used, in 30 examples.*'images'", text)
    assert f"{a}: column 'note' is not used, in 30 examples" in text
    assert f"{b}: column 'note' is not used, in 1 example" in text
    assert text.count("column '") == 3


def _run(*arguments) -> int:
    return cli.main(["data", "check", *map(str, arguments)])


def test_the_command_checks_with_fields_and_configs(place, tmp_path, capsys):
    examples, _, _ = place
    config = ["--config", "mimo_vl/easy_vqa"]
    small = ["--data.seq_len", "192", "--data.max_patches", "192", "--evaluation.data"]
    good = _write(tmp_path / "good.jsonl", [_chat("what color? " * 30, "red")])
    assert _run(good, *config, *small) == 0
    assert "1 of 1 examples can be used" in capsys.readouterr().out
    assert _run(*config, *small, "--data.seq_len", "64", good) == 1
    assert "tokens do not fit 64" in capsys.readouterr().out
    # without files, the experiment's own data and that of its stages
    stage = ["--stages.0.data.train", good, "--stages.0.data.seq_len", "64", "--stages.1.data.train", good]
    assert _run(*config, *small, "--data.train", good, *stage) == 1
    output = capsys.readouterr().out
    assert re.search(r"stages/\w+:\n0 of 1 examples(.|\n)*tokens do not fit 64(.|\n)*:\n1 of 1 examples", output)
    assert _run(examples, *config, *small, "--data.on_bad_example", "skip", "--verbose") == 1
    output = capsys.readouterr().out
    for number, (_, expected) in enumerate(EXAMPLES.values(), 1):
        assert (f"\n{examples}:{number}: field" in f"\n{output}") == (expected is not None)
    assert _run(good, *config, "--data.seq_le", "64") == 2
    assert "did you mean --data.seq_len?" in capsys.readouterr().err
    assert _run("--data.seq_len", "64") == 2
    assert "no data to check" in capsys.readouterr().err


MIXTURE = """
import dataclasses

from jvlm import configs
from jvlm.data.mixture.config import Mixture, Source


def get_config():
    config = configs.load("mimo_vl/easy_vqa")
    members = {{"a": Source(({file!r},)), "b": Source(({file!r},), weight=3.0, max_epochs=2.0)}}
    data = dataclasses.replace(config.data, train=(), mixture=Mixture(members=members))
    return dataclasses.replace(config, data=data, stages=())
"""


def test_the_command_says_what_is_worth_a_look_and_what_a_mixture_draws(place, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    lines = [_chat("<image>what color?", answer, images=["a.png"]) for answer in ("black", "white")]
    file = _write(tmp_path / "e.jsonl", lines)
    config = tmp_path / "mixed.py"
    config.write_text(MIXTURE.format(file=str(file)))
    assert _run("--config", config) == 0
    output = capsys.readouterr().out
    said = "a question that an earlier one asks of the same images, and another answer: 1"
    assert output.count(f"worth a look: examples with {said}") == 2
    assert output.count("1 image is in several examples, as in e.jsonl, line 1; e.jsonl, line 2") == 2
    assert "as a run of one pass, 4 examples (data.run_examples sets it) draws it:" in output
    assert re.search(r"\nb +2 +75\.00 % +1\.50 +1\b", output)


def test_every_rejected_example_is_written_to_the_output_and_nothing_else_is_overwritten(place, tmp_path, capsys):
    examples, _, _ = place
    output = tmp_path / "new" / "rejected.jsonl"
    for _ in range(2):  # its own file may be written again
        assert _run(examples, "--output", output) == 1
    report = check([str(examples)], None)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["file"], line["number"], line["field"]) for line in lines] == [
        (e.origin.file, e.origin.number, e.field) for e in report.rejected
    ]
    assert [path.name for path in output.parent.iterdir()] == ["rejected.jsonl"]
    before = examples.read_bytes()
    assert _run(examples, "--output", examples) == 2
    assert "is the data itself" in capsys.readouterr().err
    (tmp_path / "link.jsonl").symlink_to(examples)
    assert _run(examples, "--output", tmp_path / "link.jsonl") == 2
    assert examples.read_bytes() == before
    for content in ("my notes\n", '{"messages": []}\n', "[1]\n"):
        (tmp_path / "other.jsonl").write_text(content)
        assert _run(examples, "--output", tmp_path / "other.jsonl") == 2
        assert (tmp_path / "other.jsonl").read_text() == content
    assert _run(examples, "--output", tmp_path) == 2


@pytest.mark.slow
def test_memory_does_not_grow_with_rejected_examples(tmp_path):
    def peak(count: int) -> int:
        path = _write(tmp_path / f"{count}.jsonl", [_chat("x" * 1000, id=n) for n in range(count)])
        tracemalloc.start()
        report = check([path], None, on_rejected=lambda example: None)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert report.faults.count() == count
        return most

    peak(200)  # what is loaded once
    assert peak(8000) - peak(1000) < 7000 * 100  # bytes: a place in the file and a few counts, not examples of 1,000


def test_examples_with_nothing_to_learn_are_rejected_with_and_without_a_processor(tmp_path, place):
    path = _write(tmp_path / "examples.jsonl", [_chat("hi"), _unlearnt(_chat("hi", "red"), loss=False)])
    for processor in (None, place[1]):
        report = check([path], processor)
        assert all(isinstance(error, ExampleError) for error in report.rejected)
        assert "0 of 2 examples can be used" in report.text()
        assert ("were not checked" in report.text()) == (processor is None)
    assert _run(path) == 1


def test_lengths_are_measured_from_headers_and_kept(tmp_path, capsys):
    picture = tmp_path / "a.jpg"
    Image.new("RGB", (60, 40), "red").save(picture)
    picture.write_bytes(picture.read_bytes()[:-10])  # whole enough for a header
    records = [_chat("what color? " * 20, "red"), _chat("<image>?", "red") | {"images": ["a.jpg"]}, _chat("only asked")]
    path = _write(tmp_path / "examples.jsonl", records)
    config = ["--config", "mimo_vl/easy_vqa", "--evaluation.data"]
    config += ["--data.lengths_folder", str(tmp_path / "lengths")]
    assert _run(path, *config, "--data.on_bad_example", "skip", "--lengths") == 1
    (kept,) = (tmp_path / "lengths").iterdir()
    assert f"{kept}: lengths of 3 examples, of which 2 can be used" in capsys.readouterr().out
    with np.load(kept) as found:
        assert found["status"].tolist() == [0, 0, 1]
        assert found["images"].tolist() == [0, 1, 0]
        assert found["tokens"][0] > 40
        assert found["patches"][1] > 0
    assert _run(path, "--lengths") == 2
    assert "--lengths counts tokens" in capsys.readouterr().err

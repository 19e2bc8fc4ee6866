"""A file of examples to a file of answers, interrupted and continued."""

import json

import pytest

import jvlm
from jvlm.data.errors import ExampleError
from jvlm.errors import UserError
from jvlm.inference.batch_file import FileResult, generate_file
from jvlm.inference.engine import Engine
from jvlm.inference.requests import Event
from jvlm.inference.sampling import SamplingConfig
from jvlm.weights.finite import BrokenWeights
from tests.inference.support import prompt
from tests.support import picture

SAMPLING = SamplingConfig(max_new_tokens=5, temperature=1.5, seed=1)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Examples of one picture each, and the folder that their relative paths start from."""
    folder = tmp_path_factory.mktemp("examples")
    examples = []
    for i in range(5):
        picture(84, 56, seed=i).save(folder / f"{i}.png")
        examples.append({**prompt(f"<image>what is {i}?", images=[f"{i}.png"]), "id": i})
    return folder, examples


@pytest.fixture
def data(examples, tmp_path):
    """A function that writes lines (examples, or text as it stands) to a file beside the pictures."""
    folder, _ = examples

    def write(lines, name):
        path = folder / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


def answer(tiny, data, output, **options):
    return generate_file(tiny.model, tiny.processor, data, output, SAMPLING, batch_size=2, **options)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tiny, examples):
    """Input, and the bytes of an output made in one go."""
    folder, lines = examples
    path, output = folder / "whole.jsonl", folder / "whole_out.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert answer(tiny, path, output) == FileResult(answered=5, bad=0, existing=0)
    return path, output.read_bytes()


def test_each_line_is_the_example_with_its_answer_and_counts(tiny, examples, whole, monkeypatch):
    folder, lines = examples
    monkeypatch.chdir(folder)
    texts = jvlm.generate(tiny.model, tiny.processor, lines, max_new_tokens=5, temperature=1.5, seed=1, batch_size=2)
    found = [json.loads(line) for line in whole[1].splitlines()]
    assert [line["response"] for line in found] == texts
    for line, example in zip(found, lines, strict=True):
        assert example.items() <= line.items()
        assert line["prompt_tokens"] == tiny.processor.encode(example, generation_prompt=True).length
        assert (line["response_tokens"], line["finish"]) == (5, "length")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.55, 0.97])
def test_an_interrupted_output_is_continued_to_the_same_bytes(tiny, whole, tmp_path, kept):
    path, expected = whole
    output = tmp_path / "out.jsonl"
    output.write_bytes(expected[: int(kept * len(expected))])
    found = expected[: int(kept * len(expected))].count(b"\n")
    assert answer(tiny, path, output) == FileResult(answered=5 - found, bad=0, existing=found)
    assert output.read_bytes() == expected


def test_a_finished_output_is_left_alone(tiny, whole, tmp_path):
    path, expected = whole
    output = tmp_path / "out.jsonl"
    output.write_bytes(expected)
    assert answer(tiny, path, output) == FileResult(answered=0, bad=0, existing=5)
    assert output.read_bytes() == expected


def test_an_output_of_other_examples_is_refused_and_kept_naming_both_files(tiny, examples, whole, data, tmp_path):
    other = data([*examples[1][:1], prompt("something else"), *examples[1][2:]], "other.jsonl")
    output = tmp_path / "out.jsonl"
    output.write_bytes(whole[1])
    with pytest.raises(UserError, match=r"out\.jsonl, line 2, is not an answer to example 2 of .*other\.jsonl"):
        answer(tiny, other, output)
    assert output.read_bytes() == whole[1]


def test_an_output_longer_than_its_input_is_refused(tiny, examples, whole, data, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_bytes(whole[1])
    with pytest.raises(UserError, match=r"out\.jsonl, line 3, has no example among the 2 of .*short\.jsonl"):
        answer(tiny, data(examples[1][:2], "short.jsonl"), output)


def test_a_bad_example_stops_with_its_name_and_keeps_the_answers_before_it(tiny, examples, whole, data, tmp_path):
    bad = {**prompt("<image>what?"), "images": ["missing.png"]}
    path, output = data([*examples[1][:3], bad, examples[1][4]], "bad.jsonl"), tmp_path / "out.jsonl"
    with pytest.raises(ExampleError, match=r"bad\.jsonl, line 4, field 'images\[0\]': file not found"):
        answer(tiny, path, output)
    assert output.read_bytes() == b"".join(whole[1].splitlines(keepends=True)[:3])


def test_bad_examples_are_skipped_counted_and_not_tried_again(tiny, examples, data, tmp_path, capsys):
    lines = ["{not json", examples[1][1], {"messages": []}, examples[1][3]]
    path, output = data(lines, "skip.jsonl"), tmp_path / "out.jsonl"
    assert answer(tiny, path, output, on_bad_example="skip") == FileResult(answered=2, bad=2, existing=0)
    found = read(output)
    assert ["error" in line for line in found] == [True, False, True, False]
    assert "skip.jsonl, line 1" in found[0]["error"]
    assert found[2]["messages"] == []
    assert "2 examples answered, 2 bad examples" in capsys.readouterr().out
    assert answer(tiny, path, output, on_bad_example="skip") == FileResult(answered=0, bad=0, existing=4)


def test_a_video_that_cannot_be_decoded_says_why_and_ends_nothing(tiny, examples, data, tmp_path):
    (examples[0] / "cut.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(64))
    bad = {**prompt("<video>what?"), "videos": ["cut.mp4"]}
    path, output = data([examples[1][1], bad, examples[1][3]], "videos.jsonl"), tmp_path / "out.jsonl"
    assert answer(tiny, path, output, on_bad_example="skip") == FileResult(answered=2, bad=1, existing=0)
    said = read(output)[1]["error"]
    assert "videos.jsonl, line 2, field 'videos[0]'" in said
    assert "moov atom not found" in said or "Invalid data" in said  # what FFmpeg said first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "examples.arrayrecord"}, r"examples\.arrayrecord: give a \*\.jsonl file"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"on_bad_example": "ignore"}, "on_bad_example is 'ignore'"),
    ],
)
def test_wrong_arguments_are_refused(tiny, tmp_path, options, message):
    arguments = {"data": "examples.jsonl", "output": tmp_path / "out.jsonl"} | options
    with pytest.raises(UserError, match=message):
        generate_file(tiny.model, tiny.processor, **arguments)


def test_an_example_whose_scores_overflow_is_its_own_error_and_its_neighbours_are_answered(
    tiny, data, tmp_path, monkeypatch
):
    (word,) = tiny.processor.tokenizer("Z", add_special_tokens=False)["input_ids"]
    step = Engine.step

    def overflowing(engine):
        """One in whose scores the word makes an infinity."""
        asked = {name: one.request for name, one in engine._active.items() if word in one.request.example.tokens}
        for name in asked:
            engine.abort(name)
        error = UserError("the scores are not finite numbers")
        events = [event for event in step(engine) if event.request_id not in asked]
        return [*events, *(Event(name, finish_reason="error", error=error) for name in asked)]

    monkeypatch.setattr(Engine, "step", overflowing)
    path, output = data([prompt("good"), prompt("Z"), prompt("good")], "overflow.jsonl"), tmp_path / "out.jsonl"
    with pytest.raises(ExampleError, match=r"overflow\.jsonl, line 2, field 'messages': no answer: .* not finite"):
        answer(tiny, path, output)
    assert len(read(output)) == 1
    assert answer(tiny, path, output, on_bad_example="skip") == FileResult(answered=1, bad=1, existing=1)
    assert ["error" in line for line in read(output)] == [False, True, False]


def test_broken_weights_end_a_file_whatever_is_skipped(tiny, data, tmp_path):
    model, _ = jvlm.load(tiny.folder)
    model.decoder.norm.scale[...] = model.decoder.norm.scale[...].at[3].set(float("nan"))
    path, output = data([prompt("a"), prompt("b")], "broken.jsonl"), tmp_path / "out.jsonl"
    with pytest.raises(BrokenWeights):
        generate_file(model, tiny.processor, path, output, SAMPLING, on_bad_example="skip")
    assert output.read_bytes() == b""

"""The file of answers, as ms-swift's infer writes it."""

import json

import pytest

from jvlm.errors import UserError
from jvlm.swift import results
from jvlm.swift.infer import sampling_of
from jvlm.swift.infer_arguments import AnswerArguments


def _example(number):
    turns = [{"role": "user", "content": f"<image>{number}?"}, {"role": "assistant", "content": f"{number} "}]
    return {"messages": turns, "images": ["a"]}


EXAMPLES = [_example(number) for number in range(3)]


def test_a_line_has_the_fields_that_ms_swift_writes():
    line = results.line(EXAMPLES[1], "one")
    assert line == {
        "response": "one",
        "labels": "1 ",
        "logprobs": None,
        "messages": [{"role": "user", "content": "<image>1?"}, {"role": "assistant", "content": "one"}],
        "images": ["a"],
    }


def test_a_file_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(results.line(EXAMPLES[0], "0")) + '\n{"response": "cut')
    file = results.ResultFile(path, EXAMPLES)
    assert len(file.lines) == 1
    file.append(results.line(EXAMPLES[1], "two"))
    assert [json.loads(line)["response"] for line in path.read_text().splitlines()] == ["0", "two"]
    assert file.accuracy() == (1, 2)


def test_answers_to_other_examples_are_not_added_to(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(results.line(EXAMPLES[2], "0")) + "\n")
    with pytest.raises(UserError, match="line 1 is no answer to example 1"):
        results.ResultFile(path, EXAMPLES)
    with pytest.raises(UserError, match="more than there are examples"):
        results.ResultFile(path, [])


@pytest.mark.parametrize(
    ("given", "generation", "temperature"),
    [
        ({}, {}, 0.0),
        ({}, {"do_sample": True, "temperature": 0.1}, 0.1),
        ({}, {"do_sample": False, "temperature": 0.1}, 0.0),
        ({"temperature": 0.0}, {"do_sample": True, "temperature": 0.1}, 0.0),
        ({"temperature": 0.7}, {}, 0.7),
    ],
)
def test_what_is_not_typed_is_the_model_s_generation_config(given, generation, temperature):
    assert sampling_of(AnswerArguments(**given), generation).temperature == temperature
    assert sampling_of(AnswerArguments(**given), generation).max_new_tokens == 2048

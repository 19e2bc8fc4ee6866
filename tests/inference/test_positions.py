"""A model's last position: prompts beyond it are refused, answers end there, and neither in silence."""

import json
import warnings

import pytest

import jvlm
from jvlm import cli
from jvlm.data.errors import ExampleError
from jvlm.inference.batch_file import FileResult, generate_file
from jvlm.inference.chat import chat
from jvlm.inference.generate import stream
from jvlm.inference.sampling import SamplingConfig
from tests.inference.support import oracle_tokens, prompt
from tests.support import picture

LIMIT = 60
LONG = prompt("where is the cat on the chair? " * 40)
EXAMPLES = [prompt("what is the answer?"), prompt("what is the answer? yes, no, two"), prompt("no")]
FREE = {"max_new_tokens": 100, "stop_token_ids": ()}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The tiny checkpoint with few positions."""
    folder = tmp_path_factory.mktemp("short")
    for path in tiny.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LIMIT}))
    return folder


@pytest.fixture(scope="module")
def short(folder):
    """(model, processor)"""
    return jvlm.load(folder)


def lengths(short, examples):
    return [short[1].encode(example, generation_prompt=True).length for example in examples]


def test_answers_of_a_batch_end_each_at_the_last_position_as_transformers_would_go_on(tiny, short):
    found = [[] for _ in EXAMPLES]
    with pytest.warns(UserWarning, match=f"of the model's {LIMIT} positions") as told:
        jvlm.generate(*short, EXAMPLES, on_token=lambda i, t: found[i].append(t), **FREE)
    room = [LIMIT - n for n in lengths(short, EXAMPLES)]
    assert len(set(room)) == 3
    assert [len(tokens) for tokens in found] == room
    assert len(told) == 3
    assert found == [oracle_tokens(tiny, r, n, eos_token_id=None) for r, n in zip(EXAMPLES, room, strict=True)]


def test_an_answer_within_the_positions_is_told_nothing(short):
    most = LIMIT - lengths(short, EXAMPLES[:1])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        jvlm.generate(*short, EXAMPLES[:1], max_new_tokens=most, stop_token_ids=())


def test_positions_are_counted_and_not_tokens_where_pictures_have_fewer(short):
    record = prompt("<image>", images=[picture(56, 448)])
    example = short[1].encode(record, generation_prompt=True)
    assert example.length > LIMIT > int(example.positions.max()) + 1
    found = []
    with pytest.warns(UserWarning, match="positions"):
        jvlm.generate(*short, [record], on_token=lambda _, t: found.append(t), **FREE)
    assert len(found) == LIMIT - int(example.positions.max()) - 1


def refused(short, example):
    number = short[1].encode(example, generation_prompt=True).length
    assert number >= LIMIT
    return rf"takes {number} positions of the model's {LIMIT} \(max_position_embeddings\)"


def test_a_prompt_without_room_is_refused_with_both_numbers(short):
    message = refused(short, LONG)
    with pytest.raises(ExampleError, match=f"conversation 1, field 'messages': the prompt {message}"):
        jvlm.generate(*short, [EXAMPLES[0], LONG])
    with pytest.raises(ExampleError, match=message):
        stream(*short, LONG)


def test_a_prompt_that_fills_the_positions_leaves_no_room(short):
    words = next(n for n in range(1, 60) if lengths(short, [prompt("x" * n)])[0] == LIMIT)
    with pytest.raises(ExampleError, match=refused(short, prompt("x" * words))):
        jvlm.generate(*short, [prompt("x" * words)])
    with pytest.warns(UserWarning, match="ends after 1 of max_new_tokens = 100"):
        jvlm.generate(*short, [prompt("x" * (words - 1))], **FREE)


def test_a_file_says_which_answers_were_cut_and_which_examples_are_too_long(short, tmp_path, capsys):
    data, output = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in (EXAMPLES[0], LONG, EXAMPLES[2])))
    sampling = SamplingConfig(**FREE)
    assert generate_file(*short, data, output, sampling, on_bad_example="skip") == FileResult(2, 1, 0)
    first, second, third = (json.loads(line) for line in output.read_text().splitlines())
    for line in (first, third):
        assert line["finish"] == "length"
        assert line["prompt_tokens"] + line["response_tokens"] == LIMIT
    assert f"of the model's {LIMIT}" in second["error"]
    assert f"2 answers end before max_new_tokens, at the model's {LIMIT} positions" in capsys.readouterr().out


def test_chat_says_so_and_goes_on(short):
    lines, shown = [LONG["messages"][0]["content"], "what?", "quit"], []
    chat(*short, SamplingConfig(**FREE), read=lambda _: lines.pop(0), write=shown.append)
    text = "".join(shown)
    assert f"of the model's {LIMIT} (max_position_embeddings)" in text
    assert "[the answer ends after" in text
    assert not lines


def test_streamed_answers_are_cut_and_told_alike(short):
    with pytest.warns(UserWarning, match="positions"):
        (text,) = jvlm.generate(*short, EXAMPLES[:1], **FREE)
    with pytest.warns(UserWarning, match="positions"):
        assert "".join(stream(*short, EXAMPLES[0], **FREE)) == text


def test_the_command_line_says_so_beside_the_answer(short, folder, capsys):
    with pytest.warns(UserWarning, match="positions"):
        (text,) = jvlm.generate(*short, EXAMPLES[:1], max_new_tokens=100)
    (length,) = lengths(short, EXAMPLES[:1])
    question = EXAMPLES[0]["messages"][0]["content"]
    assert cli.main(["generate", "--model", str(folder), "--prompt", question, "--max_new_tokens", "100"]) == 0
    shown = capsys.readouterr()
    assert shown.out == text + "\n"
    assert f"jvlm: the answer ends after {LIMIT - length} of max_new_tokens = 100" in shown.err

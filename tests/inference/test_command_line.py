"""`jvlm generate` and `jvlm chat` as they are typed: each mistake is one message that names what was typed."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import jvlm
from jvlm import cli
from tests.inference.support import prompt
from tests.support import ROOT, hearing_ctrl_c, picture


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with data of three examples and a picture in it."""
    monkeypatch.chdir(tmp_path)
    write("examples.jsonl", [prompt(text) for text in "abc"])
    (tmp_path / "empty.jsonl").write_text("")
    picture(84, 56).save("cat.png")
    return tmp_path


def write(name, examples):
    with open(name, "w") as file:
        file.writelines((example if isinstance(example, str) else json.dumps(example)) + "\n" for example in examples)


def read(name):
    with open(name, "rb") as file:
        return [json.loads(line) for line in file]


def run(tiny, *arguments, command="generate"):
    return cli.main([command, "--model", str(tiny.folder), *map(str, arguments)])


FILE = ("--data", "examples.jsonl", "--output", "out.jsonl")
REFUSED = {
    "nothing": ((), "give either --prompt (with any number of --image), or --data and --output"),
    "both": (("--prompt", "a", *FILE), "give either --prompt"),
    "data without output": (("--data", "examples.jsonl"), "--output"),
    "output without data": (("--prompt", "a", "--output", "o.jsonl"), "--output"),
    "pictures beside data": ((*FILE, "--image", "cat.png"), "--image goes with --prompt"),
    "an empty prompt": (("--prompt", ""), "--prompt is empty"),
    "a prompt of spaces": (("--prompt", " \n"), "--prompt is empty"),
    "no new tokens": (("--prompt", "a", "--max_new_tokens", 0), "--max_new_tokens is 0"),
    "fewer than no tokens": ((*FILE, "--max_new_tokens", -1), "--max_new_tokens is -1"),
    "temperature NaN": (("--prompt", "a", "--temperature", "nan"), "--temperature is nan"),
    "temperature below 0": (("--prompt", "a", "--temperature", -1), "--temperature is -1.0"),
    "infinite temperature": (("--prompt", "a", "--temperature", "inf"), "--temperature is inf"),
    "top_p 0": (("--prompt", "a", "--top_p", 0), "--top_p is 0.0"),
    "top_p 2": (("--prompt", "a", "--top_p", 2), "--top_p is 2.0"),
    "top_k -1": (("--prompt", "a", "--top_k", -1), "--top_k is -1"),
    "repetition_penalty 0": (("--prompt", "a", "--repetition_penalty", 0), "--repetition_penalty is 0.0"),
    "seed -1": (("--prompt", "a", "--seed", -1), "--seed is -1"),
    "batch_size 0": ((*FILE, "--batch_size", 0), "--batch_size is 0"),
    "max_pixels 0": (("--prompt", "a", "--max_pixels", 0), "--max_pixels: 0 is not a positive whole number"),
    "limits that contradict": (
        ("--prompt", "a", "--min_pixels", 99999, "--max_pixels", 9999),
        "--min_pixels: min_pixels 99999 exceeds max_pixels 9999",
    ),
    "an unknown option": (("--prompt", "a", "--temprature", 1), "no option --temprature; did you mean --temperature?"),
    "an unknown option with =": (("--prompt", "a", "--topk=1"), "no option --topk; did you mean --top_k?"),
    "a word too many": (("--prompt", "a", "b"), "'b'"),
    "no such picture": (
        ("--prompt", "a", "--image", "cat.png", "--image", "nocat.jpg"),
        "--image nocat.jpg: file not found",
    ),
    "no picture": (("--prompt", "a", "--image", "examples.jsonl"), "--image examples.jsonl: "),
    "too few pictures": (("--prompt", "<image><image>", "--image", "cat.png"), "--image: 2 <image> tags but 1"),
    "a video tag": (("--prompt", "<video>"), "--prompt: 1 <video> tags"),
    "a prompt that is no text": (("--prompt", "a\udcff"), "--prompt: "),
    "a prompt too long": (("--prompt", "a b " * 4000), "of the model's 4096 (max_position_embeddings)"),
    "no data": (("--data", "none.jsonl", "--output", "o.jsonl"), "none.jsonl"),
    "a glob of nothing": (("--data", "no*.jsonl", "--output", "o.jsonl"), "no*.jsonl"),
    "empty data": (("--data", "empty.jsonl", "--output", "o.jsonl"), "empty.jsonl"),
    "data of another kind": (("--data", "cat.png", "--output", "o.jsonl"), "cat.png: give a *.jsonl file"),
    "the data as output": (("--data", "examples.jsonl", "--output", "./examples.jsonl"), "are the same file"),
    "a glob with the output in it": (("--data", "*.jsonl", "--output", "o.jsonl"), "part of the data"),
    "a folder as output": (("--data", "examples.jsonl", "--output", "."), "is a folder"),
    "a device as output": (("--data", "examples.jsonl", "--output", "/dev/full"), "/dev/full"),
    "an output that cannot be": (
        ("--data", "examples.jsonl", "--output", "examples.jsonl/o.jsonl"),
        "cannot be written",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_message_that_names_what_was_typed(tiny, folder, capsys, name):
    arguments, message = REFUSED[name]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run(tiny, *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("jvlm: ")
    assert "<memory>" not in shown.err
    assert shown.out == ""
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("option", ["--max_new_tokens", "--batch_size", "--top_k", "--temperature", "--min_pixels"])
def test_a_value_that_is_no_number_is_one_message(tiny, folder, capsys, option):
    assert run(tiny, "--prompt", "a", option, "many") == 2
    assert capsys.readouterr().err.startswith(f"jvlm: jvlm generate: {option} many: it takes a")


EXAMPLES = [
    prompt("good"),
    {"messages": [{"role": "user", "content": "half \ud83d emoji"}]},
    "{not json",
    {**prompt("good"), "label": "half \ud83d emoji", "number": float("nan")},
    {"messages": []},
    {"messages": [{"role": "assistant", "content": "only an answer"}]},
    {"messages": [{"role": "system", "content": "refused"}, {"role": "user", "content": "a"}]},
    prompt("<image>", images=["none.png"]),
    prompt("<image>", images=["a\0b.png"]),
    prompt("long " * 9000),
    "[" * 5000 + "]" * 5000,
    "[1]",
    {**prompt("good"), "deep": json.loads("[" * 500 + "]" * 500)},
    prompt("good"),
]
GOOD = [0, 3, 12, 13]


def test_every_bad_example_is_its_own_error_line_and_the_good_ones_are_answered(tiny, folder, capsys, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny.folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    for name in ("tokenizer_config.json",):
        values = json.loads((model / name).read_text())
        refuse = (
            "{% if messages[0]['content'] == 'refused' %}{{ raise_exception('System role not supported') }}{% endif %}"
        )
        values["chat_template"] = refuse + values["chat_template"]
        (model / name).write_text(json.dumps(values))
    write("examples.jsonl", EXAMPLES)
    options = ("--model", str(model), *FILE, "--max_new_tokens", "3", "--on_bad_example", "skip")
    assert cli.main(["generate", *options]) == 0
    lines = read("out.jsonl")
    assert [i for i, line in enumerate(lines) if "response" in line] == GOOD
    (expected,) = jvlm.generate(tiny.model, tiny.processor, [prompt("good")], max_new_tokens=3)
    assert {lines[i]["response"] for i in GOOD} == {expected}
    for i, line in enumerate(lines):
        assert i in GOOD or line["error"].startswith(f"examples.jsonl, line {i + 1}, field ")
    assert "System role not supported" in lines[6]["error"]
    assert lines[3]["label"] == "half \ud83d emoji"
    capsys.readouterr()
    assert cli.main(["generate", *options]) == 0
    assert (
        "0 examples answered, 0 bad examples, 14 examples already done (10 of them with an error)"
        in capsys.readouterr().out
    )
    (folder / "out.jsonl").write_bytes(b"")
    assert cli.main(["generate", *options[:-2]]) == 2
    assert "examples.jsonl, line 2, field 'messages[0].content'" in capsys.readouterr().err
    assert [line["response"] for line in read("out.jsonl")] == [expected]


def start(tiny, *arguments, command="generate", **environment):
    return subprocess.Popen(
        hearing_ctrl_c(sys.executable, "-m", "jvlm.cli", command, "--model", str(tiny.folder), *arguments),
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_a_file_that_goes_on_to_the_same_bytes(tiny, folder, number):
    write("many.jsonl", [prompt(f"question {i}") for i in range(2000)])
    options = ("--data", "many.jsonl", "--max_new_tokens", "8", "--batch_size", "2", "--output")
    with start(tiny, *options, "out.jsonl") as process:
        while not (folder / "out.jsonl").exists() or (folder / "out.jsonl").stat().st_size < 200:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)  # between two looks at the file
        process.send_signal(number)
        assert process.wait() in (-number, 130)
    done = (folder / "out.jsonl").read_bytes()
    count = done.count(b"\n")
    assert 0 < count < 2000
    # as many examples again, to compare with a run that was not stopped
    lines = (folder / "many.jsonl").read_text().splitlines(keepends=True)[: count + 3]
    (folder / "few.jsonl").write_text("".join(lines))
    few = ("--data", "few.jsonl", *options[2:])
    assert run(tiny, *few, "out.jsonl", "--accept_changes") == 0
    assert run(tiny, *few, "whole.jsonl") == 0
    assert (folder / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


@pytest.mark.slow
def test_neither_bad_bytes_nor_an_ascii_terminal_end_a_chat(tiny, folder):
    questions = b"what?\n\xff\xfe\nwhat?\nquit\n"
    settings = {"PYTHONIOENCODING": "ascii"}
    with start(tiny, "--max_new_tokens", "40", "--temperature", "3", command="chat", **settings) as process:
        out, err = process.communicate(questions)
    assert process.returncode == 0, err
    assert out.count(b"not UTF-8 text") == 1
    assert out.count(b"\\ufffd") >= 2


def test_standard_output_in_ascii_holds_the_whole_answer(tiny, folder, monkeypatch):
    options = {"max_new_tokens": 40, "temperature": 3.0, "seed": 2}
    (expected,) = jvlm.generate(tiny.model, tiny.processor, [prompt("what?")], **options)
    assert not expected.isascii()
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run(tiny, "--prompt", "what?", *(w for name, v in options.items() for w in (f"--{name}", v))) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == expected.encode("ascii", "backslashreplace") + b"\n"

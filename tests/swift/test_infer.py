"""``jvlm infer`` at a terminal and to files, and ``jvlm generate`` with several adapters, on a small checkpoint."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

import jvlm
from jvlm import cli
from jvlm.adapters.attach import attach
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.peft_write import write_peft
from jvlm.errors import UserError
from jvlm.inference.generate import stream
from tests.adapters.test_several import random_adapter
from tests.training.support import write_examples

ADAPTERS = {
    "a": AdapterConfig(rank=4, targets=("all-linear",)),
    "b": AdapterConfig(rank=2, targets=("q_proj", "down_proj"), use_dora=True),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    made = tmp_path_factory.mktemp("infer")
    write_examples(made, 4)
    shutil.copytree(tiny.folder, made / "model")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        write_peft(random_adapter(tiny.model, config, seed), tiny.model.config, made / name, base_name="model")
    return made


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """The working directory of a user, with ``model``, its adapters and ``examples.jsonl``."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers(path):
    return [json.loads(line)["response"] for line in path.read_text().splitlines()]


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, words, folder):
        master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jvlm.cli", *words],
            cwd=folder,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.master, self.shown = master, ""

    def until(self, text, seconds=240):
        """Return what is shown from here to a text, which is waited for; None is the end of the process."""
        start, end = len(self.shown), time.monotonic() + seconds
        while text is None or text not in self.shown[start:]:
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"nothing for {seconds} s: {self.shown}"
            try:
                self.shown += os.read(self.master, 4096).decode()
            except OSError:  # the other end is closed
                assert text is None, self.shown
                break
        return self.shown[start:]

    def type(self, line):
        os.write(self.master, f"{line}\n".encode())

    def ended(self):
        """Return the exit status."""
        self.until(None)
        os.close(self.master)
        return self.process.wait(60)


@pytest.mark.slow
def test_a_conversation_at_a_terminal_streams_and_takes_ms_swift_s_commands(folder, tiny):
    words = "infer --model model --adapters a --stream true --max_new_tokens 6 --temperature 0 --torch_dtype float32"
    terminal = Terminal(words.split(), folder)
    terminal.until("<<< ")
    terminal.type("what color is the shape?")
    first = terminal.until("<<< ")
    row = {"messages": [{"role": "user", "content": "what color is the shape?"}]}
    model = attach(tiny.model, random_adapter(tiny.model, ADAPTERS["a"], 0))
    (expected,) = jvlm.generate(model, tiny.processor, [row], max_new_tokens=6)
    assert expected.splitlines()[0].strip() in first
    terminal.type("<image>and here?")
    terminal.until("Path of the")
    terminal.type("nowhere.png")
    assert "nowhere.png" in re.sub(r"\s", "", terminal.until("<<< "))
    terminal.type("clear")
    terminal.until("<<< ")
    terminal.type("what color is the shape?")
    assert terminal.until("<<< ") == first  # the same question, of an empty conversation
    terminal.type("quit")
    assert terminal.ended() == 0


@pytest.mark.slow
def test_streamed_answers_to_a_file_are_those_of_batches_and_an_unfinished_file_goes_on(folder, capsys):
    line = "infer --model model --adapters a --val_dataset examples.jsonl --max_new_tokens 5 --temperature 0"
    line += " --torch_dtype float32 --result_path {} --stream {}"
    assert cli.main(line.format("whole.jsonl", "false --max_batch_size 4").split()) == 0
    whole = (folder / "whole.jsonl").read_text().splitlines()
    assert len(whole) == 4
    (folder / "begun.jsonl").write_text(f"{whole[0]}\n{whole[1][:20]}")
    capsys.readouterr()
    assert cli.main(line.format("begun.jsonl", "true").split()) == 0
    printed = capsys.readouterr().out
    assert "1 of 4 answers are there already" in printed
    assert answers(folder / "begun.jsonl") == answers(folder / "whole.jsonl")
    for answer in answers(folder / "begun.jsonl")[1:]:
        assert answer in printed


@pytest.mark.slow
def test_each_line_of_a_file_is_answered_by_the_adapter_that_it_names(folder, tiny):
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    names = ["b", None, "a", "b"]
    lines = [{**row, **({"adapter": name} if name else {})} for row, name in zip(rows, names, strict=True)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = "generate --model model --adapters a=a b=b --data asked.jsonl --output out.jsonl --max_new_tokens 5"
    assert cli.main(line.split()) == 0
    found = answers(folder / "out.jsonl")
    alone = {name: attach(tiny.model, random_adapter(tiny.model, c, n)) for n, (name, c) in enumerate(ADAPTERS.items())}
    models = {None: tiny.model, **alone}
    expected = {name: jvlm.generate(one, tiny.processor, rows, max_new_tokens=5) for name, one in models.items()}
    for number, name in enumerate(names):
        assert found[number] == expected[name][number]
    folders = {name: folder / name for name in ADAPTERS}
    pieces = stream(tiny.model, tiny.processor, lines[0], adapters=folders, max_new_tokens=5)
    assert "".join(pieces) == found[0]
    pieces = stream(tiny.model, tiny.processor, rows[2], adapters=folders, adapter="a", max_new_tokens=5)
    assert "".join(pieces) == found[2]


def test_an_adapter_that_is_not_there_is_an_error_before_the_first_piece(tiny):
    row = {"messages": [{"role": "user", "content": "hi"}], "adapter": "a"}
    with pytest.raises(UserError, match="names the adapter 'a', and the model was loaded without"):
        stream(tiny.model, tiny.processor, row)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("infer", "give --adapters CHECKPOINT, or --model DIR"),
        ("infer --adapters a=a b=b", "jvlm generate --model DIR --adapters a=DIR b=DIR"),
        ("infer --adapters a=a", "takes a folder without a name in front of it"),
        ("infer --adapters empty", "empty holds neither adapter_config.json nor config.json"),
        ("infer --model model --val_dataset nothing.jsonl", "no data file matches 'nothing.jsonl'"),
        ("infer --model model --val_dataset empty.jsonl", "empty.jsonl: empty, 0 bytes"),
        ("infer --adapters a --load_data_args true", "it is written by jvlm sft"),
        ("infer --model model --val_dataset examples.jsonl --max_batch_size 0", "--max_batch_size must be at least 1"),
        ("generate --model model --adapters a=a b=b --prompt hi --adapter c", "no adapter 'c'; there are a, b"),
        ("generate --model model --adapters a=a a=b --prompt hi", "a"),
    ],
)
def test_a_mistake_is_one_message(folder, capsys, words, message):
    (folder / "empty").mkdir()
    (folder / "empty.jsonl").touch()
    assert cli.main(words.split()) == 2
    assert message in capsys.readouterr().err

"""What the user can fix is one message and status 2; everything else is a crash with a traceback and status 1."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jvlm
from jvlm import cli, job
from jvlm.data import check
from jvlm.data.errors import ExampleError
from jvlm.errors import UserError, file_errors
from jvlm.parallel import hosts
from jvlm.weights.table import WeightError

CONFIG = """
from jvlm.training.config import Experiment

def helper():
    {}

def get_config():
    {}
"""
# source of a config file (or the two bodies of CONFIG) -> what is printed after the file's name
CONFIGS = {
    "an error of Python's": (("", "return int('x')"), ", line 8: ValueError: invalid literal for int"),
    "an error in a function of the file": (("1 / 0", "helper()"), ", line 5: ZeroDivisionError: division by zero"),
    "an import that fails": ("import no_such_module\n", ", line 1: ModuleNotFoundError: No module named"),
    "a syntax error": ("x = 1\nif True\n", ", line 2: SyntaxError: expected ':'"),
    "no get_config": ("def get_configuration(): pass\n", " defines no get_config()"),
    "get_config that is no function": ("get_config = 3\n", " defines no get_config()"),
    "another return value": (("", "return {}"), ", line 7: get_config() returned a dict, not an Experiment"),
    "an unknown field": (("", "return Experiment(nme='a')"), ", line 8: TypeError: "),
    "a field out of range": (
        ("", "return Experiment(name='a', init_from='b', steps=0)"),
        ", line 8: steps must be at least 1, got 0",
    ),
    "no model": (("", "return Experiment(name='a')"), ", line 8: give init_from"),
    "a file that is not text": (b"\xff\xfe\x00", ""),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    (tmp_path / "examples.jsonl").write_text(json.dumps(example) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "a_folder.jsonl").mkdir()
    (tmp_path / "examples.csv").write_text("a,b\n")
    (tmp_path / "examples.xlsx").write_text("a,b\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    (tmp_path / "config.py").write_text(CONFIG.format("pass", "return Experiment(name='a', init_from='gone')"))
    return tmp_path


def _main(*arguments):
    """The exit status; argparse and tyro leave by SystemExit."""
    try:
        return cli.main(list(arguments))
    except SystemExit as exit:
        return exit.code


@pytest.mark.parametrize("name", CONFIGS)
def test_an_error_in_a_config_names_its_file_and_line(folder, capsys, name):
    source, said = CONFIGS[name]
    if isinstance(source, tuple):
        source = CONFIG.format(*(body or "pass" for body in source))
    path = folder / "mine.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    assert _main("train", str(path)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"jvlm: {path}{said}")
    assert "Traceback" not in shown


MISTAKES = {
    "train without a config": (("train",), "give a config: jvlm train CONFIG"),
    "no such config": (("train", "nowhere.py"), "no config at nowhere.py"),
    "a folder as config": (("train", "taken"), "no config at taken"),
    "no data": (("train", "config.py"), "a: no data to train on; give files on the command line as --data.train"),
    "no such data": (("train", "config.py", "--data.train", "gone.jsonl"), "no data file matches 'gone.jsonl'"),
    "no such model": (("train", "config.py", "--data.train", "examples.jsonl"), "gone"),
    "data out of range": (("train", "config.py", "--data.max_bad_fraction", "2"), "data.max_bad_fraction must be from"),
    "a profile that is none": (("train", "config.py", "--profile", "x"), "profile is FIRST:LAST"),
    "no batches to replay": (("replay", "taken"), "taken holds no batches"),
    "a model that is a file": (
        ("generate", "--model", "examples.csv", "--prompt", "a"),
        "examples.csv is not a folder",
    ),
    "a folder without a model": (("generate", "--model", "taken", "--prompt", "a"), "taken has neither config.json"),
    "check without files": (("data", "check"), "no data to check: give files"),
    "check of nothing": (("data", "check", "gone.jsonl"), "no data file matches 'gone.jsonl'"),
    "check of an empty file": (("data", "check", "empty.jsonl"), "empty.jsonl: empty, 0 bytes"),
    "check of a folder": (("data", "check", "a_folder.jsonl"), "a_folder.jsonl: a folder"),
    "check of another kind": (("data", "check", "examples.xlsx"), "examples.xlsx: examples are read from *.jsonl"),
    "a list that is a folder": (("data", "check", "examples.jsonl", "--output", "taken"), "taken: a folder"),
    "a list that cannot be": (
        ("data", "check", "examples.jsonl", "--output", "examples.csv/list.jsonl"),
        "examples.csv/list.jsonl cannot be written (",
    ),
    "shards over others": (
        ("data", "convert", "examples.jsonl", "--output", "examples.csv"),
        "examples.csv",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_about_what_was_typed_and_status_2(folder, capsys, name):
    arguments, said = MISTAKES[name]
    assert _main(*arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("jvlm: ")
    assert said in shown
    assert "Traceback" not in shown


def test_a_config_that_may_not_be_read_is_named(folder, capsys, monkeypatch):
    def refuse(path):  # as the system does, though the tests may run as root, who may read every file
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert _main("train", "config.py") == 2
    assert "config.py cannot be read (Permission denied)" in capsys.readouterr().err


def test_the_traceback_is_there_on_request(folder, capsys):
    assert _main("--traceback", "train", "nowhere.py") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "\njvlm: no config at nowhere.py" in shown


# what no user has written, though a library calls it ValueError or a missing file
CRASHES = {
    "ValueError of JAX": (job, "run", ValueError("Received incompatible devices for jitted computation")),
    "RuntimeError of XLA": (job, "run", jax.errors.JaxRuntimeError("UNAVAILABLE: the TPU worker is gone")),
    "a file that vanished": (job, "run", FileNotFoundError(2, "No such file or directory", "/lib/x")),
    "KeyError of ours": (check, "check", KeyError("messages")),
    "a full disk under the logs": (job, "run", OSError(28, "No space left on device")),
}


@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_is_not_taken_for_a_mistake(folder, monkeypatch, capsys, name):
    owner, function, error = CRASHES[name]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(owner, function, fail)
    arguments = ("train", "config.py") if owner is job else ("data", "check", "examples.jsonl")
    with pytest.raises(type(error)) as raised:
        _main(*arguments)
    assert raised.value is error
    assert "jvlm: " not in capsys.readouterr().err


def test_a_crash_of_the_command_has_a_traceback_and_status_1(folder):
    code = "import sys; from jvlm import cli, job; job.run = lambda _: [][0]; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "config.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "IndexError" in done.stderr


def test_an_interrupt_is_one_line_and_130(folder, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check", interrupt)
    assert _main("data", "check", "examples.jsonl") == 130
    assert capsys.readouterr().err == "\njvlm: interrupted; run the same command to go on\n"


def test_a_user_error_is_no_error_of_python():
    """A handler of ValueErrors, ours or another library's, neither hides one nor makes one of a bug."""
    for kind in (UserError, ExampleError, WeightError):
        assert issubclass(kind, UserError)
        assert not issubclass(kind, ValueError | OSError | LookupError | TypeError | RuntimeError)


def test_only_what_is_the_systems_is_said_of_a_file(tmp_path):
    reading = pytest.raises(UserError, match=r"x\.txt cannot be read \(No such file or directory\)")
    with reading, file_errors(tmp_path / "x.txt", "read"):
        Path(tmp_path / "x.txt").read_text()
    with pytest.raises(KeyError), file_errors(tmp_path, "read"):
        raise KeyError("a")


@pytest.mark.parametrize("error", [UserError("a"), ValueError("a"), OSError()], ids=repr)
def test_other_processes_learn_whether_it_was_a_mistake(monkeypatch, error):
    def fail():
        raise error

    sent = []
    monkeypatch.setattr(hosts, "all_gather_object", lambda value: sent.append(value) or [None])
    with pytest.raises(type(error)):
        hosts.run_on_all(fail)
    monkeypatch.setattr(hosts, "all_gather_object", lambda _: [sent[0], None])
    with pytest.raises(hosts.PeerFailed) as raised:
        hosts.run_on_all(lambda: 1)
    assert raised.value.is_user_error == isinstance(error, UserError)


def test_a_conversation_from_python_is_called_by_its_index(tiny, tmp_path):
    good = {"messages": [{"role": "user", "content": "hi"}]}
    bad = {"messages": [{"role": "user", "content": "<image>hi"}], "images": [str(tmp_path / "nocat.jpg")]}
    for work in (
        lambda: tiny.processor.pack([good, bad]),
        lambda: jvlm.generate(tiny.model, tiny.processor, [good, bad], max_new_tokens=1),
    ):
        with pytest.raises(UserError, match=r"^conversation 1, field 'images\[0\]': file not found"):
            work()
    with pytest.raises(UserError, match=r"^the conversation, field 'images\[0\]': file not found"):
        tiny.processor.encode(bad)

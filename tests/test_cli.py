"""The command line as a whole: every command, every option, what it says of itself, and how fast."""

import dataclasses
import importlib
import re
import typing

import docstring_parser
import pytest

import jvlm
from jvlm import cli, configs, options
from jvlm.training.config import Experiment
from tests.support import run_python

# what has to be typed for all options of a command to be known
ARGUMENTS = {
    "train": ("mimo_vl/easy_vqa",),
    "rl": ("mimo_vl/morl",),
    "sweep": ("mimo_vl/easy_vqa", "--vary", "seed=1"),
    "plan": ("idefics2/pretrain",),
    "data check": ("--config", "mm1_5/easy_vqa"),
}


def _help(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def narrow(monkeypatch):
    """A terminal too narrow for two columns of boxes."""
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize(("command", "arguments"), [*((name, ()) for name in cli.COMMANDS), *ARGUMENTS.items()])
def test_every_option_of_every_command_has_help(capsys, narrow, command, arguments):
    text = _help(capsys, *command.split(), *arguments)
    cells = [cell.strip() for line in text.splitlines() for cell in line.split("│")]
    cells = [cell for cell in cells if cell]
    silent, seen = [], 0
    for cell, after in zip(cells, [*cells[1:], ""], strict=True):
        option = re.match(r"(-h, )?--[\w.]+( \S+)*?(?:  (?P<help>.*)|$)", cell)
        if option:
            seen += 1
            words = option["help"] or after
            silent += [] if re.sub(r"\((default|required|repeatable)[^)]*\)", "", words).strip() else [cell]
    assert seen >= 1
    assert not silent


def _dataclasses(kind, found):
    """All dataclasses that a field of ``kind`` may hold, and theirs."""
    if dataclasses.is_dataclass(kind) and kind not in found:
        found.append(kind)
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            _dataclasses(hints[field.name], found)
        for sub in kind.__subclasses__():
            if sub.__module__.startswith("jvlm."):  # not of another test
                _dataclasses(sub, found)
    for inner in typing.get_args(kind):
        _dataclasses(inner, found)
    return found


def _commands():
    modules = [importlib.import_module(module) for module, _ in cli.COMMANDS.values()]
    return [v for m in modules for v in vars(m).values() if dataclasses.is_dataclass(v) and v.__module__ == m.__name__]


@pytest.mark.parametrize("root", [Experiment, *_commands()], ids=lambda kind: kind.__name__)
def test_every_field_of_every_configuration_is_documented_by_itself(root):
    lacking = {}
    for kind in _dataclasses(root, []):
        # a subclass inherits its base's fields with their documentation
        known = set()
        for base in kind.__mro__:
            parsed = docstring_parser.parse(base.__doc__ or "")
            known |= {p.arg_name for p in parsed.params if p.description}
        missing = [field.name for field in dataclasses.fields(kind) if field.name not in known]
        if missing:
            lacking[kind.__name__] = missing
    assert not lacking


def test_the_command_alone_lists_the_commands_with_a_line_each(capsys):
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, line) in cli.COMMANDS.items():
        assert any(found.split() == [*name.split(), *line.split()] for found in lines)
    assert cli.main(["data"]) == 0
    assert "data convert" in capsys.readouterr().out


def test_the_version_is_the_package_s(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{jvlm.__version__}\n"


def test_train_alone_lists_the_shipped_configs_and_is_no_success(capsys):
    assert cli.main(["train"]) == 2
    error = capsys.readouterr().err
    for name, summary in configs.shipped().items():
        assert re.search(rf"^  {re.escape(name)} +{re.escape(summary)}$", error, re.MULTILINE)
        assert summary
    assert cli.main(["configs"]) == 0
    assert capsys.readouterr().out.strip() in error


# some read folders: those of `make backbones`, and one of MiMo-7B
@pytest.mark.parametrize(
    "name",
    [name for name in configs.shipped() if not name.startswith("backbones/") and name != "align/mimo_7b_reward_model"],
)
def test_every_shipped_config_loads(name):
    assert isinstance(configs.load(name), Experiment)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_wrong_option_is_refused_by_every_command_with_the_nearest(capsys, command):
    arguments = ARGUMENTS.get(command, ())
    module = importlib.import_module(cli.COMMANDS[command][0])
    words = [f"--{name}" for name in _flags(capsys, command, arguments)]
    wrong = f"{words[-1]}x" if words else "--anything"
    assert cli.main([*command.split(), *arguments, wrong, "1"]) == 2
    error = capsys.readouterr().err
    assert f"has no option {wrong}" in error
    assert (f"did you mean {words[-1]}?" if words else "--help lists them") in error
    assert module.run


def _flags(capsys, command, arguments):
    text = _help(capsys, *command.split(), *arguments)
    return sorted({name for name in re.findall(r"[│ ] --([\w.]+)", text) if name != "help"}, key=len)


@pytest.mark.parametrize("typed", [["trian"], ["data", "chek"], ["data", "convrt", "x"]])
def test_a_wrong_command_is_refused_with_the_nearest(capsys, typed):
    assert cli.main(typed) == 2
    nearest = {"trian": "train", "chek": "data check", "convrt": "data convert"}[typed[min(len(typed) - 1, 1)]]
    assert f"did you mean jvlm {nearest}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data.on_too_long", "cut"], ["--data.on_too_long", "error", "drop", "truncate", "shrink"]),
        (["--export.enabled", "maybe"], ["--export.enabled", "True", "False"]),
        (["--optimizer.learning_rate", "fast"], ["--optimizer.learning_rate fast", "a number"]),
        (["--seed"], ["--seed"]),
    ],
)
def test_a_wrong_value_names_the_option_and_what_it_takes(capsys, monkeypatch, words, says):
    monkeypatch.setenv("COLUMNS", "400")
    assert cli.main(["train", "mimo_vl/easy_vqa", *words]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in says)


@pytest.mark.parametrize("words", [["--help"], ["configs"], ["data", "check", "--help"], ["data", "convert", "--help"]])
def test_help_is_there_before_jax_would_be(words):
    report = "print(sorted({'jax', 'flax', 'grain', 'orbax', 'tensorstore', 'transformers'} & set(sys.modules)))"
    code = f"import sys; from jvlm.cli import main\ntry: main({words!r})\nexcept SystemExit: pass\n{report}"
    assert run_python(code).splitlines()[-1] == "[]"


def test_the_configuration_of_training_loads_no_reader_of_data_or_checkpoints():
    loaded = run_python(
        "import sys, jvlm.training.config; print(sorted({'grain', 'orbax', 'tensorstore'} & set(sys.modules)))"
    )
    assert loaded.strip() == "[]"


def test_options_of_two_dataclasses_stand_side_by_side():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        """Inner.

        Attributes:
          size: of it.
          on: whether it is.
        """

        size: int = 1
        on: bool = True

    @dataclasses.dataclass(frozen=True)
    class Outer:
        """Outer.

        Attributes:
          inner: one.
          model: other.
        """

        inner: Inner = Inner()
        model: str = "a"

    @dataclasses.dataclass(frozen=True)
    class Command:
        """Command.

        Attributes:
          verbose: talk.
          model: folder.
        """

        verbose: bool = False
        model: str | None = None

    words = ["--inner.on", "false", "--verbose", "--inner.size=3", "--model", "b"]
    command, outer = options.parse_with(Command(), Outer(), words, "x")
    assert (command, outer) == (Command(True, "b"), Outer(Inner(3, False), "a"))
    assert list(options.option_names(Outer)) == ["inner.size", "inner.on", "model"]
    assert isinstance(options.parse(Outer, [], "x"), Outer)


def test_options_of_former_names_still_work():
    @dataclasses.dataclass(frozen=True)
    class Data:
        """Data.

        Attributes:
          on_bad_example: what to do.
        """

        on_bad_example: str = "error"

    @dataclasses.dataclass(frozen=True)
    class Command:
        """Command.

        Attributes:
          data: data.
          examples_per_shard: how many.
        """

        data: Data = Data()
        examples_per_shard: int = 1

    words = ["--data.on_bad_row", "skip", "--rows_per_shard=3"]
    assert options.parse(Command, words, "x") == Command(Data("skip"), 3)

"""The command line: `main` finds the command; each has a file, which parses its options, calls the library, prints."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
import traceback

import jvlm
from jvlm import compiled_programs
from jvlm.cli.errors import NOT_CRASHES, print_error
from jvlm.errors import UserError

# A command's module has the dataclass of its options and ``run(words) -> exit status``. It is imported when it is
# called: the list of commands needs neither jax nor a parser.
COMMANDS = {
    "sft": ("jvlm.cli.sft", "fine-tune on conversations: adapters, or all of the model"),
    "pt": ("jvlm.cli.pt", "train on all tokens of conversations"),
    "rlhf": ("jvlm.cli.rlhf", "train on preferred and rejected answers: DPO, KTO, reward models"),
    "reward-check": ("jvlm.cli.reward_check", "pair accuracy, length bias and blindness of a reward model"),
    "reward-serve": ("jvlm.cli.reward_serve", "judge answers over HTTP, for reinforcement learning"),
    "infer": ("jvlm.cli.infer", "answer with a checkpoint"),
    "export": ("jvlm.cli.export", "merge, quantise, check or upload a checkpoint"),
    "eval": ("jvlm.cli.eval", "score a model, or a server, on benchmarks"),
    "merge-lora": ("jvlm.cli.merge_lora", "add an adapter to the model that it was trained on"),
    "train": ("jvlm.cli.train", "train, score, export and report an experiment"),
    "rl": ("jvlm.cli.rl", "train on rewards of sampled answers, from an experiment's config"),
    "sweep": ("jvlm.cli.sweep", "train an experiment with every combination of some values, and compare"),
    "report": ("jvlm.cli.report", "compare the stages of a training on one page: scores by task, curves, pictures"),
    "rl-samples": ("jvlm.cli.rl_samples", "show what a step of jvlm rl sampled, on a page with pictures and boxes"),
    "rl-rescore": ("jvlm.cli.rl_rescore", "compute the rewards of a run's stored answers again"),
    "configs": ("jvlm.cli.configs", "list the experiments that come with jvlm"),
    "plan": ("jvlm.cli.plan", "compile a step for TPUs or GPUs that are not here: memory, traffic, bounds on speed"),
    "replay": ("jvlm.cli.replay", "find what is not finite in a stopped run; repeat a step of jvlm rl"),
    "generate": ("jvlm.cli.generate", "answer one prompt, or every line of a JSONL file"),
    "chat": ("jvlm.cli.chat", "talk with a model in the terminal"),
    "evaluate": ("jvlm.cli.evaluate", "score a model, or a server, on benchmarks"),
    "serve": ("jvlm.cli.serve", "answer over HTTP, as OpenAI's API does"),
    "deploy": ("jvlm.cli.deploy", "the same with ms-swift's arguments"),
    "convert": ("jvlm.cli.convert", "write a checkpoint as a Hugging Face folder, in another dtype or layout"),
    "data check": ("jvlm.cli.data_check", "count examples that can and cannot be used, and say why"),
    "data view": ("jvlm.cli.data_view", "write a page to look at data: numbers, rejected examples, samples"),
    "data convert": ("jvlm.cli.data_convert", "write examples of any format, and their media, as ArrayRecord shards"),
    "data dedup": ("jvlm.cli.data_dedup", "find duplicates by words and images, and leave them out"),
    "data decontaminate": ("jvlm.cli.data_decontaminate", "find examples of evaluation sets, and leave them out"),
    "data filter": ("jvlm.cli.data_filter", "measure examples, show histograms, and leave out what is beyond limits"),
    "data render": ("jvlm.cli.data_render", "draw text, formulas, code, tables and web pages as examples"),
    "data pdf": ("jvlm.cli.data_pdf", "write pages of PDF files, with their text, as examples"),
    "data shard": ("jvlm.cli.data_convert", "another name of data convert"),
}
_GROUPS = {
    "Fine-tuning, with ms-swift's arguments": (
        "sft",
        "pt",
        "rlhf",
        "reward-check",
        "reward-serve",
        "infer",
        "export",
        "eval",
        "merge-lora",
    ),
    "Training from a config": (
        "train",
        "rl",
        "sweep",
        "report",
        "configs",
        "plan",
        "replay",
        "rl-samples",
        "rl-rescore",
    ),
    "Answers": ("generate", "chat", "serve", "deploy"),
    "Scores": ("evaluate",),
    "Files": ("convert", "data check", "data view", "data convert", "data shard"),
    "Preparing data": ("data dedup", "data decontaminate", "data filter", "data render", "data pdf"),
}

# commands of ms-swift, and the nearest thing
_ELSEWHERE = {
    "app": "jvlm chat talks in the terminal",
    "web-ui": "jvlm chat talks in the terminal",
}
_TRAINING = ("train", "rl", "sft", "pt", "rlhf")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status.

    A `UserError` is printed as one message. Every other exception is a crash and leaves this function: Python prints
    its traceback and exits with status 1, after which a launcher may run the command again.

    0 done; 1 a crash; 2 a user error, which the same command meets again; 3 done, but the scores are below an aim of
    the experiment; 75 training was asked to stop (SIGTERM, Ctrl-C, preemption), has saved, and goes on with the same
    command; 130 a second Ctrl-C, and nothing is saved; 141 nobody reads the output any more.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = words[:1] == ["--traceback"]
    _print_anything()
    try:
        return _run(words[show_traceback:], show_traceback)
    except BrokenPipeError:
        # whoever read the output has seen enough; closing it at the end must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except NOT_CRASHES as error:
        if show_traceback:
            traceback.print_exc()
        return print_error(error)


def _run(words: list[str], show_traceback: bool) -> int:
    if words[:1] == ["--version"]:
        print(jvlm.__version__)
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(_list(COMMANDS))
        return 0
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    if name not in COMMANDS:
        group = {command: COMMANDS[command] for command in COMMANDS if command.split()[0] == name}
        if group and (len(words) == 1 or words[1] in ("-h", "--help")):
            print(_list(group))
            return 0
        if name in _ELSEWHERE:
            raise UserError(f"no command {name!r}: {_ELSEWHERE[name]}")
        typed = " ".join(words[:2]) if group else name
        near = difflib.get_close_matches(typed, group or COMMANDS, n=1)
        hint = f"did you mean jvlm {near[0]}?" if near else f"there are {', '.join(group or COMMANDS)}"
        raise UserError(f"no command {typed!r}; {hint}")
    if name != "plan":  # JAX could not read programs again that are for devices of another machine, and would warn
        compiled_programs.keep()
    module, _ = COMMANDS[name]
    run, words = importlib.import_module(module).run, words[len(name.split()) :]
    # of several processes each ends by itself, and so shows its own error
    return run(words, show_traceback=show_traceback) if name in _TRAINING else run(words)


def _list(commands: dict[str, tuple[str, str]]) -> str:
    groups = [(title, [n for n in names if n in commands]) for title, names in _GROUPS.items()]
    lines = "\n\n".join(
        "\n".join([f"{title}:", *(f"  {name:<12} {commands[name][1]}" for name in names)])
        for title, names in groups
        if names
    )
    return (
        "usage: jvlm [--traceback] COMMAND ...\n\nTrain, run and export vision-language models in JAX.\n\n"
        f"{lines}\n\njvlm COMMAND --help shows a command's options; --traceback, before the command, where an error\n"
        "came from; jvlm --version the version."
    )


def _print_anything() -> None:
    """Escape what the terminal's encoding lacks; without this such a character ends an answer."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

"""``jvlm sft``: fine-tuning on conversations, with ms-swift's arguments."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jvlm.cli.train import Processes, run_job
from jvlm.options import FLAT
from jvlm.swift import words as swift_words
from jvlm.swift.arguments import OptimizationArguments, TrainingArguments
from jvlm.swift.other_names import environment_notes

if TYPE_CHECKING:
    from jvlm.training.config import Experiment


@dataclasses.dataclass(frozen=True)
class Sft(TrainingArguments):
    """Fine-tune a model on conversations: adapters or all of it. Arguments and defaults are ms-swift's.

    Attributes:
      write_config: write the experiment that the arguments stand for as a config for jvlm train, and train nothing.
      processes: which processes train together.
    """

    write_config: str | None = None
    processes: Annotated[Processes, FLAT] = Processes()


@dataclasses.dataclass(frozen=True)
class Pt(Sft):
    """Train on all tokens of conversations, prompts included. Arguments and defaults are ms-swift's.

    Attributes:
      optimization: batches, optimizer and schedule.
    """

    optimization: Annotated[OptimizationArguments, FLAT] = OptimizationArguments(loss_scale="all")


def run(words: list[str], *, show_traceback: bool = False) -> int:
    return train(Sft, "sft", words, show_traceback=show_traceback)


def train(
    kind: type[Sft],
    command: str,
    words: Sequence[str],
    *,
    show_traceback: bool,
    run_of: Callable[[Sft], Callable[[Experiment], object] | None] = lambda _: None,
) -> int:
    """Run a training command. Returns the exit status.

    Args:
      run_of: returns what runs the experiment of some arguments; None is `jvlm.job.run`.
    """
    parsed = swift_words.parse(kind, words, f"jvlm {command}")
    for note in (*environment_notes(os.environ), *parsed.notes):
        print(f"jvlm: {note}", file=sys.stderr)
    if parsed.arguments.hub.hub_token is not None:
        os.environ["HF_TOKEN"] = parsed.arguments.hub.hub_token  # where the hub's own library looks for it
    if parsed.arguments.write_config is not None:
        return _write_config(parsed, command, "train" if run_of(parsed.arguments) is None else "rl")

    def experiment() -> Experiment:
        from jvlm.parallel import hosts
        from jvlm.swift import config_file, saved
        from jvlm.swift.train import prepare, resumed

        arguments, given = resumed(parsed.arguments, parsed.given)
        made = prepare(arguments, given)
        hosts.log_rank0(f"this is the experiment\n{config_file.text(made)}")
        if hosts.is_rank0():
            saved.write(Path(made.output_root, made.name), command, arguments, given)
        made_of.append(made)
        return made

    made_of: list[Experiment] = []
    run = run_of(parsed.arguments)
    status = run_job(experiment, parsed.arguments.processes, show_traceback=show_traceback, run=run)
    if status == 0:
        _report(made_of[0])
    return status


def _write_config(parsed: swift_words.Parsed[Sft], command: str, runner: str) -> int:
    from jvlm.swift import config_file
    from jvlm.swift.train import prepare, resumed

    arguments, given = resumed(parsed.arguments, parsed.given)
    path = Path(arguments.write_config)
    config_file.write(prepare(arguments, given), path, f"Written by jvlm {command}; runs with: jvlm {runner} {path}")
    print(f"wrote {path}; jvlm {runner} {path} runs it")
    return 0


def _report(experiment: Experiment) -> None:
    from jvlm.parallel import hosts
    from jvlm.swift.train import last_checkpoint

    last = last_checkpoint(experiment)
    if last is not None and hosts.is_rank0():
        print(f"last checkpoint: {last}; jvlm infer --adapters {last} answers with it")

"""``jvlm rlhf``: training on preferred and rejected answers, with ms-swift's arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jvlm.cli import rl
from jvlm.cli.sft import Sft, train
from jvlm.options import FLAT
from jvlm.swift.arguments import OptimizationArguments, RlhfArguments

if TYPE_CHECKING:
    from jvlm.training.config import Experiment


@dataclasses.dataclass(frozen=True)
class Rlhf(Sft, RlhfArguments):
    """Train a model on answers that people, or a model, preferred, or on rewards of its own answers. Arguments and
    defaults are ms-swift's.

    Attributes:
      optimization: batches, optimizer and schedule.
    """

    optimization: Annotated[OptimizationArguments, FLAT] = OptimizationArguments(loss_scale="last_round")


def run(words: list[str], *, show_traceback: bool = False) -> int:
    return train(Rlhf, "rlhf", words, show_traceback=show_traceback, run_of=_run_of)


def _run_of(arguments: Rlhf) -> Callable[[Experiment], Path] | None:
    return rl.run_experiment if arguments.preference.rlhf_type == "grpo" else None

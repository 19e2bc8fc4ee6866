"""``jvlm rlhf``: training on preferred and rejected answers, with ms-swift's arguments."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from jvlm.cli.sft import Sft, train
from jvlm.options import FLAT
from jvlm.swift.arguments import OptimizationArguments, RlhfArguments


@dataclasses.dataclass(frozen=True)
class Rlhf(Sft, RlhfArguments):
    """Train a model on answers that people, or a model, preferred. Arguments and defaults are ms-swift's.

    Attributes:
      optimization: batches, optimizer and schedule.
    """

    optimization: Annotated[OptimizationArguments, FLAT] = OptimizationArguments(loss_scale="last_round")


def run(words: list[str], *, show_traceback: bool = False) -> int:
    return train(Rlhf, "rlhf", words, show_traceback=show_traceback)

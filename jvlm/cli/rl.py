"""``jvlm rl``: an experiment that learns from rewards of the answers that it samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from jvlm.cli.train import Processes, parsed, run_job
from jvlm.options import FLAT

if TYPE_CHECKING:
    from jvlm.training.config import Experiment


@dataclasses.dataclass(frozen=True)
class Rl:
    """Train on rewards of sampled answers, score, export and report. The experiment's fields are options too: `jvlm rl
    CONFIG --help` lists them.

    Attributes:
      config: a Python file with get_config(), or the name of a shipped one, as `jvlm configs` lists them. Its task is a
        `jvlm.rl.task.PolicyTask`.
      processes: which processes train together.
    """

    config: Positional[str]
    processes: Annotated[Processes, FLAT] = Processes()


def run(words: list[str], *, show_traceback: bool = False) -> int:
    make_experiment, processes = parsed(Rl, words, "jvlm rl")
    return run_job(make_experiment, processes, show_traceback=show_traceback, run=run_experiment)


def run_experiment(experiment: Experiment) -> Path:
    """Train a policy, score, export and report it. Returns the run folder."""
    from jvlm import job
    from jvlm.rl.run import train

    return job.run(experiment, train)

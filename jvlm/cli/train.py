"""``jvlm train``: an experiment from its config to a scored, exported, reported model."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagConversionOff, Positional

from jvlm import configs, host_memory
from jvlm.cli.errors import NOT_CRASHES, print_error
from jvlm.cli.experiment import split_words
from jvlm.options import FLAT, parse, parse_with

if TYPE_CHECKING:
    from jvlm.training.config import Experiment


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that train together.

    Attributes:
      distributed: join the other processes of a TPU pod, a GKE job or a SLURM job.
      coordinator: host:port of process 0, where nothing announces it.
      num_processes: how many processes there are (with --coordinator).
      process_id: which of them this is, from 0 (with --coordinator).
    """

    distributed: FlagConversionOff[bool] = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Train:
    """Train, score, export and report an experiment. Its fields are options too: `jvlm train CONFIG --help` lists them.

    Attributes:
      config: a Python file with get_config(), or the name of a shipped one, as `jvlm configs` lists them.
      processes: which processes train together.
    """

    config: Positional[str]
    processes: Annotated[Processes, FLAT] = Processes()


def run(words: list[str], *, show_traceback: bool = False) -> int:
    make_experiment, processes = parsed(Train, words, "jvlm train")
    return run_job(make_experiment, processes, show_traceback=show_traceback)


def parsed(command: type, words: list[str], program: str) -> tuple[Callable[[], Experiment], Processes]:
    """Return what makes the experiment of a command's words, once the processes have met, and which these are.

    Args:
      command: a dataclass of a config and `Processes`, whose help is printed where no config is given.
    """
    processes, config, fields = split_words(Processes, words, program)
    if config is None:
        parse(command, words, program)

    def experiment() -> Experiment:
        return parse_with(command(config, processes), configs.load(config), fields, f"{program} {config}")[1]

    return experiment, processes


def run_job(
    make_experiment: Callable[[], Experiment],
    processes: Processes,
    *,
    show_traceback: bool,
    run: Callable[[Experiment], object] | None = None,
) -> int:
    """Run an experiment, together with other processes where there are any. Returns the exit status.

    Args:
      make_experiment: called once the processes have met.
      run: what runs it; None is `jvlm.job.run`.
    """
    host_memory.keep_freed_memory()
    import jax

    from jvlm import job
    from jvlm.evaluation import aim
    from jvlm.parallel import hosts
    from jvlm.training.interruption import EXIT_STATUS, Interrupted
    from jvlm.training.nonfinite import Diverged

    if processes.distributed or processes.coordinator:
        hosts.initialise(processes.coordinator, processes.num_processes, processes.process_id)
    try:
        (run or job.run)(make_experiment())
    except Interrupted as stopped:
        print(f"jvlm: {stopped}", file=sys.stderr)
        return EXIT_STATUS
    except Diverged as diverged:
        print(f"jvlm: {diverged}", file=sys.stderr)
        return 1
    except aim.AimMissed as missed:
        if hosts.is_rank0():
            print(f"jvlm: aim missed: {missed}", file=sys.stderr)
        return aim.EXIT_STATUS
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        elsewhere = isinstance(error, hosts.PeerFailed)
        known = isinstance(error, NOT_CRASHES) or elsewhere
        if show_traceback or not known:
            traceback.print_exc()
        status = print_error(error) if known else 1
        # a user error is one on every process: whoever starts them again must not, whichever ends first
        hosts.abort(1 if elsewhere and not error.is_user_error else status)
    return 0

"""``jvlm sweep``: an experiment trained with every combination of some values, and compared."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from typing import TYPE_CHECKING

from tyro.conf import Positional

from jvlm.cli.experiment import split_words
from jvlm.errors import UserError
from jvlm.options import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jvlm.sweep.results import RunResult
    from jvlm.sweep.runner import Ended, State, SweepConfig
    from jvlm.sweep.trials import Trial


@dataclasses.dataclass(frozen=True)
class Options:
    """What is varied, and where trials run.

    Attributes:
      vary: field=value,value,... of the experiment, any number of them; all combinations are trained. "seed=1,2,3"
        repeats each, and intervals are then over runs. "config=one,other" compares configs.
      together: the fields change in step, first values with first values, and are not combined; but each such setting
        is run with every seed.
      name: of the sweep; the same command with the same name goes on where it stopped.
      output_root: folder of runs, or an address in an object store.
      parallel: trials that run at a time.
      submit: a command that trains one trial elsewhere and ends when it has, with {config}, {name}, {output_root} and
        {fields} in it: 'python launch/tpu.py run {config} --name {name} --output {output_root} ... -- {fields}'.
        Empty trains on this machine.
      compare: run nothing; compare the trials that are finished.
      dry_run: print the commands, and run nothing.
    """

    vary: tuple[str, ...] = ()
    together: bool = False
    name: str = "sweep"
    output_root: str = "runs"
    parallel: int = 1
    submit: str = ""
    compare: bool = False
    dry_run: bool = False


@dataclasses.dataclass(frozen=True)
class Sweep(Options):
    """Train an experiment with every combination of some values, and compare what comes of it.

    Fields of the experiment are options too, for all trials: `jvlm train CONFIG --help` lists them.

    Attributes:
      config: a Python file with get_config(), or the name of a shipped one, as `jvlm configs` lists them.
    """

    config: Positional[str] = ""


def run(words: list[str]) -> int:
    options, config, fields = split_words(Options, _gathered(words), "jvlm sweep")
    if config is None or {"-h", "--help"} & set(fields):
        parse(Sweep, ["--help"], "jvlm sweep")
    from jvlm.sweep import runner, trials

    if options.parallel < 1:
        raise UserError(f"jvlm sweep: --parallel {options.parallel}: at least one trial runs at a time")
    varied = [trials.Vary.parse(text) for text in options.vary]
    chosen = trials.trials_of(config, varied, together=options.together)
    where = runner.SweepConfig(options.name, options.output_root, tuple(fields), options.submit, options.parallel)
    if options.dry_run:
        print("\n".join(shlex.join(where.command(trial)) for trial in chosen))
        return 0
    state = runner.State(where.folder)
    ended: list[Ended] = []
    if not options.compare:
        trials.check(chosen, fields)
        state.check(where, chosen)
        done = sum(state.status(trial) in runner.DONE for trial in chosen)
        print(f"{len(chosen)} trials" + (f", {done} of them done before" if done else ""), flush=True)
        ended = runner.run(where, chosen, state, lambda one: print(_end_line(one), flush=True))
    found = _found(where, chosen, state, everything=options.compare)
    _report(where, config, chosen, state, found)
    return runner.exit_status(ended)


def _gathered(words: Sequence[str]) -> list[str]:
    """Return the words with all values of every --vary behind one, at the end."""
    values: list[str] = []
    others: list[str] = []
    at_vary = False
    for word in words:
        if word == "--vary" or word.startswith("--vary="):
            at_vary = True
            values += [word.removeprefix("--vary=")] if "=" in word else []
        elif at_vary and "=" in word and not word.startswith("--"):
            values.append(word)
        else:
            at_vary = False
            others.append(word)
    return [*others, "--vary", *values] if values else others


def _end_line(one: Ended) -> str:
    from jvlm.sweep import runner

    if one.status in runner.DONE:
        return f"{one.trial}: done" + (", an aim was missed" if one.status else "")
    last = one.log.read_text(errors="replace").strip().splitlines()[-3:]
    return "\n    ".join([f"{one.trial}: ended with status {one.status}, {one.log} ends with", *last])


def _found(where: SweepConfig, chosen: Sequence[Trial], state: State, *, everything: bool) -> dict[str, RunResult]:
    """Return slug -> result of the trials that are done; with ``everything``, also of those whose run was found."""
    from jvlm.sweep import results, runner

    found: dict[str, RunResult] = {}
    for trial in chosen:
        folder = where.run_folder(trial)
        if state.status(trial) in runner.DONE or (everything and (folder / results.ANSWERS).exists()):
            found[trial.slug] = results.read_run(folder)
    return found


def _report(
    where: SweepConfig, config: str, chosen: Sequence[Trial], state: State, found: dict[str, RunResult]
) -> None:
    from jvlm.sweep import page, results

    states = {trial.slug: _state(trial, state, found) for trial in chosen}
    if not found:
        print("no trial is finished: nothing to compare", file=sys.stderr)
        return
    where.folder.mkdir(parents=True, exist_ok=True)
    path = where.folder / "sweep.html"
    page.write(path, where, config, chosen, found, states)
    print(results.table(found, chosen))
    missing = len(chosen) - len(found)
    if missing:
        print(f"{missing} of {len(chosen)} trials are not finished, and left out")
    print(f"page: {path}")


def _state(trial: Trial, state: State, found: dict[str, RunResult]) -> str:
    if trial.slug in found:
        return "done"
    status = state.status(trial)
    return "not finished" if status is None else f"failed with status {status}, see logs/{trial.slug}.txt"

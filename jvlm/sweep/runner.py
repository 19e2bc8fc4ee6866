"""Running the trials of a sweep: each a process, on this machine or by a command that submits it elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from jvlm.data import stores
from jvlm.errors import UserError
from jvlm.evaluation.aim import EXIT_STATUS as AIM_MISSED
from jvlm.sweep.trials import Trial
from jvlm.training.interruption import EXIT_STATUS as INTERRUPTED
from jvlm.training.run_storage import LOCAL_COPIES
from jvlm.training.side_files import read_json, write_json

STATE = "sweep.json"
DONE = (0, AIM_MISSED)  # statuses of trials that are not run again
PLACEHOLDERS = ("{config}", "{name}", "{output_root}", "{fields}")


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """What a sweep is.

    Attributes:
      name: of the sweep, and of its folder.
      output_root: folder of runs, or an address in an object store.
      fields: command-line words of all trials.
      submit: command that trains one trial somewhere else and ends when it has, with `PLACEHOLDERS`; empty trains here.
      parallel: how many trials run at a time.
    """

    name: str
    output_root: str
    fields: tuple[str, ...] = ()
    submit: str = ""
    parallel: int = 1

    @property
    def folder(self) -> Path:
        """Where the sweep's own files are: on this disk, also where the runs are not."""
        root = self.output_root.rstrip("/")
        return (
            Path(LOCAL_COPIES, root.replace("://", "/"), self.name) if stores.is_remote(root) else Path(root, self.name)
        )

    def run_folder(self, trial: Trial) -> epath.Path:
        """Where a trial's run is."""
        root = stores.at(self.output_root)
        return root / f"{self.name}-{trial.slug}" if self.submit else root / self.name / trial.slug

    def command(self, trial: Trial) -> list[str]:
        """Return the words of the command that runs a trial."""
        fields = [*self.fields, *trial.words]
        if not self.submit:
            root = f"{self.output_root.rstrip('/')}/{self.name}"
            where = ["--output_root", root, "--name", trial.slug]
            return [sys.executable, "-m", "jvlm.cli", "train", trial.config, *where, *fields]
        values = {
            "{config}": [trial.config],
            "{name}": [f"{self.name}-{trial.slug}"],
            "{output_root}": [self.output_root],
            "{fields}": fields,
        }
        return [part for word in shlex.split(self.submit) for part in _filled(word, values)]


def _filled(word: str, values: Mapping[str, Sequence[str]]) -> list[str]:
    if word in values:
        return list(values[word])
    for placeholder, words in values.items():
        word = word.replace(placeholder, shlex.join(words))
    return [word]


class State:
    """What is known of the trials: a file that is written whole after each of them, so that a sweep can go on."""

    def __init__(self, folder: Path):
        self._path = folder / STATE
        self._lock = threading.Lock()
        known = read_json(self._path, "delete it; trials whose runs are finished will then be scored again")
        self._trials: dict[str, dict[str, Any]] = (known or {}).get("trials", {})

    def check(self, sweep: SweepConfig, trials: Sequence[Trial]) -> None:
        """Raise UserError if a trial of the same name was run by another command."""
        for trial in trials:
            earlier = self._trials.get(trial.slug, {}).get("command")
            if earlier is not None and earlier != sweep.command(trial)[1:]:
                raise UserError(
                    f"{self._path}: trial {trial} was started as\n  {shlex.join(earlier)}\nand is now\n"
                    f"  {shlex.join(sweep.command(trial)[1:])}\ngive the sweep another --name, or its earlier settings"
                )

    def status(self, trial: Trial) -> int | None:
        """Return the exit status of a trial's last process; None if it has not ended."""
        return self._trials.get(trial.slug, {}).get("status")

    def record(self, sweep: SweepConfig, trial: Trial, status: int | None, seconds: float) -> None:
        """Note how a trial stands; None is running."""
        with self._lock:
            before = self._trials.get(trial.slug, {}).get("seconds", 0.0)
            self._trials[trial.slug] = {
                "values": dict(trial.values),
                "command": sweep.command(trial)[1:],
                "status": status,
                "seconds": round(before + seconds, 1),
            }
            write_json(self._path, {"name": sweep.name, "trials": self._trials})


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a trial's process ended, and where its output is."""

    trial: Trial
    status: int
    log: Path


def run(sweep: SweepConfig, trials: Sequence[Trial], state: State, on_end: Callable[[Ended], None]) -> list[Ended]:
    """Run the trials that are not done; those that were cut short go on where they were. Returns how each ended.

    A signal to stop is passed to the trials that run, which save and end; no other is started.

    Args:
      on_end: called as each ends, from the thread that ran it.
    """
    waiting = [trial for trial in trials if state.status(trial) not in DONE]
    with _Processes() as processes, ThreadPoolExecutor(sweep.parallel) as pool:
        futures = [pool.submit(_run_one, sweep, trial, state, processes, on_end) for trial in waiting]
        return [ended for future in futures if (ended := future.result()) is not None]


def _run_one(
    sweep: SweepConfig, trial: Trial, state: State, processes: _Processes, on_end: Callable[[Ended], None]
) -> Ended | None:
    if processes.stopping:
        return None
    log = sweep.folder / "logs" / f"{trial.slug}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    state.record(sweep, trial, None, 0.0)
    print(f"{trial}: started, output in {log}", flush=True)
    began = time.monotonic()
    with open(log, "ab") as output:
        try:
            process = processes.start(sweep.command(trial), output)
        except FileNotFoundError as error:
            raise UserError(f"--submit: there is no program {sweep.command(trial)[0]}") from error
        status = process.wait()
    state.record(sweep, trial, status, time.monotonic() - began)
    ended = Ended(trial, status, log)
    on_end(ended)
    return ended


class _Processes:
    """The processes that run; SIGINT and SIGTERM are passed on to them."""

    def __init__(self):
        self.stopping = False
        self._running: list[subprocess.Popen] = []
        self._lock = threading.Lock()

    def start(self, command: Sequence[str], output) -> subprocess.Popen:
        # in a session of its own: a Ctrl-C reaches it once, from here
        with self._lock:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            self._running.append(process)
            return process

    def _stop(self, number: int, _frame) -> None:
        self.stopping = True
        print("stopping: the trials that run save and end", file=sys.stderr, flush=True)
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def __enter__(self) -> _Processes:
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def exit_status(ended: Sequence[Ended]) -> int:
    """Return the status of a sweep: that of an interrupted trial, else 1 if one failed, else 0."""
    statuses = [one.status for one in ended]
    if any(status == INTERRUPTED or status < 0 for status in statuses):
        return INTERRUPTED
    return 0 if all(status in DONE for status in statuses) else 1

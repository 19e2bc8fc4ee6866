"""Several servers of one model on one machine, each a process with its share of the devices."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from jvlm.errors import UserError
from jvlm.server.listen import SHUTDOWN_SECONDS, print_line

_LOOK_SECONDS = 1.0
_LEAST_LIFE = 60.0  # a process that ends sooner would only end again
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_NVIDIA = "/proc/driver/nvidia/gpus"


def device_shares(
    count: int, environment: Mapping[str, str], *, proc: str = _NVIDIA, dev: str = "/dev"
) -> list[dict[str, str]]:
    """Return what each of so many processes has in its environment, so that each sees its share of the chips.

    On a machine without GPUs and TPUs, or where JAX is told to use the CPU, all share the cores.

    Raises:
      UserError: chips that cannot be shared evenly.
    """
    if environment.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return [{} for _ in range(count)]
    gpus = _listed(environment.get("CUDA_VISIBLE_DEVICES"), proc)
    tpus = _listed(environment.get("TPU_VISIBLE_CHIPS"), dev, "accel") or _listed(None, f"{dev}/vfio", "", "vfio")
    chips = gpus or tpus
    if not chips:
        return [{} for _ in range(count)]
    if len(chips) % count:
        raise UserError(
            f"--data_parallel_size {count} cannot share {len(chips)} chips evenly; take a divisor of {len(chips)}"
        )
    size = len(chips) // count
    shares = [",".join(chips[k * size : (k + 1) * size]) for k in range(count)]
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": share} for share in shares]
    one = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": _bounds(size)}
    return [{"TPU_VISIBLE_CHIPS": share, **one} for share in shares]


def _listed(visible: str | None, folder: str, prefix: str = "", skipped: str = "") -> list[str]:
    """Return the chips that are named, or those that a folder has an entry for, by number."""
    if visible is not None:
        return [name for name in visible.split(",") if name]
    try:
        names = [name for name in os.listdir(folder) if name.startswith(prefix) and name != (skipped or None)]
    except OSError:
        return []
    return [str(number) for number in range(len(names))]


def _bounds(chips: int) -> str:
    try:
        return {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}[chips]
    except KeyError:
        raise UserError(f"a process cannot have {chips} TPU chips; it has 1, 2, 4 or 8") from None


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Replicas:
    """The processes, from the beginning to the end of a ``with`` block; one that ends is started again.

    Args:
      command: of jvlm, without host and port.
      shares: environment of each, as `device_shares` returns it.

    Attributes:
      urls: where they listen.
      has_failed: whether one ended so soon that the server was asked to stop.
    """

    def __init__(
        self, command: Sequence[str], shares: Sequence[Mapping[str, str]], *, log: Callable[[str], None] = print_line
    ):
        ports = free_ports(len(shares))
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self._commands = [[*command, "--host", "127.0.0.1", "--port", str(port)] for port in ports]
        self._shares, self._log = shares, log
        self._processes: list[subprocess.Popen] = []
        self._began: list[float] = []
        self._stopping = threading.Event()
        self.has_failed = False
        self._watcher = threading.Thread(target=self._watch, name="jvlm-replicas", daemon=True)

    def __enter__(self) -> Self:
        for number in range(len(self._shares)):
            self._processes.append(self._start(number))
            self._began.append(time.monotonic())
        self._watcher.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping.set()
        self._watcher.join()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(SHUTDOWN_SECONDS + 10)
            except subprocess.TimeoutExpired:
                process.kill()

    def _start(self, number: int) -> subprocess.Popen:
        environment = {**os.environ, **self._shares[number]}
        # a signal of the terminal reaches this process alone, which ends the others when answers have ended
        return subprocess.Popen(
            self._commands[number], env=environment, start_new_session=True, preexec_fn=_end_with_parent
        )

    def _watch(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            for number, process in enumerate(self._processes):
                if process.poll() is None:
                    continue
                if time.monotonic() - self._began[number] < _LEAST_LIFE:
                    self._log(f"jvlm: engine {number} ended with status {process.returncode}; the server stops")
                    self.has_failed = True
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._log(f"jvlm: engine {number} ended with status {process.returncode}; it is started again")
                self._processes[number], self._began[number] = self._start(number), time.monotonic()


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)


def command_of(words: Sequence[str], verb: str) -> list[str]:
    """Return the command that runs a verb of jvlm with these words in a process of its own."""
    return [sys.executable, "-m", "jvlm.cli", verb, *words]

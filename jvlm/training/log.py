"""What a run says: the terminal, logging.jsonl and TensorBoard, all from the same numbers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import psutil
from tqdm import tqdm

from jvlm.training.side_files import read_lines, write_lines

LOG = "logging.jsonl"
GIB = 2**30


def clock(seconds: float) -> str:
    """Seconds as ms-swift writes them: 1h 2m 3s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}m {seconds}s" if hours else f"{minutes}m {seconds}s" if minutes else f"{seconds}s"


def memory_gib() -> float:
    """Peak bytes in use on the first device, or of this process where the device does not tell (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    used = stats["peak_bytes_in_use"] if stats else psutil.Process().memory_info().rss
    return used / GIB


class TrainingLog:
    """Progress bar, log lines and curves. Use as a context manager.

    After a restart, lines of steps that will be run again are removed, so the file reads as if nothing happened.

    Args:
      folder: of the run.
      start, steps: first step to run and number of steps in all.
      writes: whether to write at all; one process of many does.
    """

    def __init__(self, folder: Path, start: int, steps: int, *, writes: bool = True):
        self.start, self.steps, self.writes = start, steps, writes
        self._began = time.perf_counter()
        self._before = 0.0
        if not writes:
            return
        self.path = folder / LOG
        kept = [line for line in read(folder) if line["step_number"] <= start]
        write_lines(self.path, kept)
        self._before = kept[-1]["elapsed_seconds"] if kept else 0.0
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  (closed in __exit__)
        # tensorboardX imports torch wherever torch is installed; importing jvlm must not
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        # the log lines are enough where there is no terminal
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1, disable=None)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.writes:
            return
        self._bar.close()
        self._board.close()
        self._file.close()

    def elapsed(self) -> float:
        """Seconds of training, those before a restart included."""
        return self._before + time.perf_counter() - self._began

    def advance(self) -> None:
        """One step further on the bar."""
        if self.writes:
            self._bar.update(1)

    def write(self, step: int, values: dict[str, float], notes: Mapping[str, Any] | None = None) -> None:
        """One line for a step; ``values`` are plain numbers, written in full to file and shortened to the screen.

        What is not finite is null in the file, as JSON wants it, and left out of the curves. ``notes`` go to the file.
        """
        if not self.writes:
            return
        here = time.perf_counter() - self._began
        pace = here / max(step - self.start, 1)
        line = {
            **values,
            "step": f"{step}/{self.steps}",
            "elapsed": clock(self.elapsed()),
            "remaining": clock(pace * (self.steps - step)),
            "memory(GiB)": round(memory_gib(), 2),
            "speed(s/it)": round(pace, 4),
        }
        shown = {k: _short(v) for k, v in line.items() if not k.startswith(("grad_norm/", "router/"))}
        self._bar.write(str(shown).replace("'", ""))
        self._bar.set_postfix(loss=_short(values["loss"]), acc=_short(values["token_acc"]), refresh=False)
        plain = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}
        numbers = {"step_number": step, "elapsed_seconds": self.elapsed()}
        self._file.write(json.dumps({**plain, **numbers, **(notes or {})}) + "\n")
        for name, value in values.items():
            if plain[name] is not None:
                self._board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.writes:
            self._bar.write(text)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read(folder: Path) -> list[dict[str, Any]]:
    """The log lines of a run; a last line cut short by a crash is left out."""
    return read_lines(folder / LOG)

"""What a run reports: the terminal, logging.jsonl and TensorBoard, all from the same numbers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import psutil
from tqdm import tqdm

from jvlm.parallel import hosts
from jvlm.training.hooks import Hook, StepResult
from jvlm.training.side_files import read_lines, write_lines
from jvlm.training.train_step import SOURCES
from jvlm.units import GIB

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer

LOG = "logging.jsonl"
_FILE_ONLY = (
    "grad_norm/",
    "router/",
    "token_acc/",
    "examples/",
    "tokens/",
    "epoch/",
    "rejected/",
    "pass_rate/",
    "length/",
    "stop_token/",
    "gradient/",
    "seconds/",
    "boxes/",
)  # too many for a line on the terminal


def clock(seconds: float) -> str:
    """Return seconds as ms-swift writes them: 1h 2m 3s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}m {seconds}s" if hours else f"{minutes}m {seconds}s" if minutes else f"{seconds}s"


def memory_gib() -> float:
    """Return the peak bytes in use on the first device, or of this process where the device does not tell (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    used = stats["peak_bytes_in_use"] if stats else psutil.Process().memory_info().rss
    return used / GIB


class TrainingLog(Hook):
    """Progress bar, log lines and curves, written by process 0.

    After a restart, lines of steps that will be run again are removed, so the file reads as if nothing happened.

    Args:
      folder: of the run.
      interval_steps: steps between lines; the first step of a start and the last one have a line each.
      changes: accepted changes to the run, noted in the first line.
    """

    def __init__(self, folder: Path, interval_steps: int, changes: Sequence[str] = ()):
        self.folder, self.interval, self.changes = folder, interval_steps, list(changes)
        self.seconds = 0.0
        self._writes = hosts.is_rank0()

    def on_train_start(self, trainer: Trainer) -> None:
        self._start, self._steps = trainer.step, trainer.steps
        self._began = time.perf_counter()
        self._before = 0.0
        if not self._writes:
            return
        valid = [line for line in read(self.folder) if line["step_number"] <= self._start]
        write_lines(self.folder / LOG, valid)
        self._before = valid[-1]["elapsed_seconds"] if valid else 0.0
        self._file = open(self.folder / LOG, "a", buffering=1)  # noqa: SIM115  (closed in on_stop)
        # tensorboardX imports torch wherever torch is installed; importing jvlm must not
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._start + 1)
        # the log lines are enough where there is no terminal
        self._bar = tqdm(
            total=self._steps, initial=self._start, unit="step", dynamic_ncols=True, smoothing=0.1, disable=None
        )
        if self._start:
            self._bar.write(f"resuming after step {self._start}")

    def on_stop(self, trainer: Trainer, error: BaseException | None) -> None:
        self.seconds = self.elapsed()
        if self._writes:
            self._bar.close()
            self._board.close()
            self._file.close()

    def elapsed(self) -> float:
        """Return the seconds of training, those before a restart included."""
        return self._before + time.perf_counter() - self._began

    def is_due(self, trainer: Trainer, step: int) -> bool:
        return step % self.interval == 0 or step in (trainer.start + 1, trainer.steps)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        if self.is_due(trainer, result.step):
            values = {name: float(value) for name, value in result.metrics.items() if name != SOURCES}
            first = {name: values.pop(name) for name in ("loss", "grad_norm", "token_acc") if name in values}
            extra: dict[str, float] = {}
            for hook in trainer.hooks:
                extra |= hook.log_values(trainer)
            self._write(result.step, {**first, **values, **extra})
        if self._writes:
            self._bar.update(1)

    def _write(self, step: int, values: dict[str, float]) -> None:
        """Write one line; ``values`` are written in full to the file and shortened to the screen.

        What is not finite is null in the file, as JSON wants it, and left out of the curves.
        """
        if not self._writes:
            return
        pace = (time.perf_counter() - self._began) / max(step - self._start, 1)
        line = {
            **values,
            "global_step/max_steps": f"{step}/{self._steps}",
            "elapsed_time": clock(self.elapsed()),
            "remaining_time": clock(pace * (self._steps - step)),
            "memory(GiB)": round(memory_gib(), 2),
            "train_speed(s/it)": round(pace, 4),
        }
        self._show({k: v for k, v in line.items() if not k.startswith(_FILE_ONLY) and k.count("/") < 2})
        short = {"loss": values["loss"], **({"acc": values["token_acc"]} if "token_acc" in values else {})}
        self._bar.set_postfix({name: _short(value) for name, value in short.items()}, refresh=False)
        notes = {"accepted_changes": self.changes} if self.changes else {}
        self.changes = []
        self._record(step, line, values, notes)

    def on_evaluation(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Write a line of its own, whose names begin with "eval_"."""
        if self._writes:
            values = {f"eval_{name}": value for name, value in values.items()}
            line = {**values, "global_step/max_steps": f"{trainer.step}/{self._steps}"}
            self._show(line)
            self._record(trainer.step, line, values, {})

    def _show(self, line: Mapping[str, Any]) -> None:
        self._bar.write(str({name: _short(value) for name, value in line.items()}).replace("'", ""))

    def _record(
        self, step: int, line: Mapping[str, Any], values: Mapping[str, float], notes: Mapping[str, Any]
    ) -> None:
        plain = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}
        numbers = {"step_number": step, "elapsed_seconds": self.elapsed()}
        self._file.write(json.dumps({**plain, **numbers, **notes}) + "\n")
        for name, value in values.items():
            if plain[name] is not None:
                self._board.add_scalar(name, value, step)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


class Fill(NamedTuple):
    """Shares of the tokens, and of the patches, of a run's packed sequences that were no padding."""

    tokens: float
    patches: float

    def __str__(self) -> str:
        return f"{100 * self.tokens:.1f} % of the tokens, {100 * self.patches:.1f} % of the patches"


def fill(lines: Sequence[Mapping[str, Any]]) -> Fill | None:
    """Return how full the sequences of a run were, over all steps of its log; None where it does not say."""
    before, steps, full = 0, 0, np.zeros(2)
    for line in lines:
        if line.get("padding_text") is None:
            continue
        count, before = line["step_number"] - before, line["step_number"]
        full += count * (1 - np.asarray([line["padding_text"], line["padding_patches"]]))
        steps += count
    return Fill(*(full / steps).tolist()) if steps else None


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the log lines of a run; a last line cut short by a crash is left out."""
    return read_lines(folder / LOG)

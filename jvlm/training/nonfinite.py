"""Steps whose loss or gradient is not finite: counted, and after too many in a row written down for `jvlm replay`.

A dump is a folder of the run:

nonfinite/FIRST-LAST/report.json             the steps, and where the conversations of their batches came from
                     STEP.PROCESS.npz        the batches of a step as this process had them, one field an array
                     params                  Orbax; the parameters that met them: skipped steps change nothing
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jvlm import json_files
from jvlm.data.errors import Origin
from jvlm.data.packing import PackedSequences
from jvlm.errors import UserError
from jvlm.models.batch import PackedBatch
from jvlm.training.hooks import Hook, StepResult
from jvlm.training.state import Params

if TYPE_CHECKING:
    from jvlm.training.trainer import Trainer

NONFINITE, REPORT, PARAMS = "nonfinite", "report.json", "params"


class Diverged(RuntimeError):
    """The loss or the gradient of too many steps in a row was not finite.

    `jvlm train` ends with status 1. The same command repeats the same steps from the last checkpoint, so it helps only
    where the hardware was at fault; otherwise see what `jvlm replay` says, and change data, learning rate or start.
    """


class NonFiniteMonitor(Hook):
    """Counts skipped steps and ends a run that diverged. The device runs one step ahead of the host, no more.

    Args:
      folder, store: of the run, for batches and for parameters (jvlm.training.run_storage).
      stop_after: skipped steps in a row that end it.
    """

    def __init__(self, folder: Path, store: epath.Path, stop_after: int):
        self.folder, self.store, self.stop_after = folder, store, stop_after
        self.skipped = 0
        self._in_a_row: list[tuple[int, Sequence[PackedSequences]]] = []
        self._before = 0  # skipped in a row before a restart; their batches are gone
        self._pending: StepResult | None = None

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Wait for the step before this one, and for this one if anybody reads it.

        After a skipped step each one is waited for, so that when the run stops, none that changes the parameters
        stands between them and the batches that are written.

        Raises:
          Diverged: too many in a row; their batches are written.
        """
        last, self._pending = self._pending, result
        if last is not None:
            self._judge(last)
        if self._in_a_row or self._before or self.stop_after == 1 or trainer.is_due(result.step):
            self._judge(self._pending)
            self._pending = None
        if self._before + len(self._in_a_row) >= self.stop_after:
            raise Diverged(self._dump(trainer.state.params))

    def _judge(self, result: StepResult) -> None:
        if float(result.metrics["skipped"]):
            self.skipped += 1
            self._in_a_row.append((result.step, result.packed))
        else:
            self._in_a_row, self._before = [], 0

    def _dump(self, params: Params) -> str:
        """Write the skipped batches and the parameters; returns what to tell the user."""
        first, last = self._in_a_row[0][0], self._in_a_row[-1][0]
        folder = (self.folder / NONFINITE / f"{first}-{last}").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        process = jax.process_index()
        for step, packed in self._in_a_row:
            arrays = {f"{i}.{n}": a for i, sequences in enumerate(packed) for n, a in _arrays(sequences.batch).items()}
            np.savez_compressed(folder / f"{step}.{process}.npz", **arrays)
        steps = {
            str(step): {
                "static": _static(packed[0].batch),
                "origins": [
                    [[dataclasses.astuple(o) for o in sequence] for sequence in sequences.origins]
                    for sequences in packed
                ],
            }
            for step, packed in self._in_a_row
        }
        (folder / f"{process}.{REPORT}").write_text(json.dumps(steps, indent=2) + "\n")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.store / NONFINITE / folder.name / PARAMS, params, force=True)
        steps = f"{first} to {last}" if last > first else f"{first}"
        return (
            f"loss or gradient not finite, {self._before + len(self._in_a_row)} steps in a row (stop_after_skips); the "
            f"batches of steps {steps} are in {folder}. See which conversation it is with: jvlm replay {folder}"
        )

    def log_values(self, trainer: Trainer) -> dict[str, float]:
        return {"skipped": self.skipped}

    def state(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self._before + len(self._in_a_row)}

    def restore(self, state: dict[str, int], step: int) -> None:
        self.skipped, self._before = state["skipped"], state["in_a_row"]

    def summary(self) -> str:
        """Return what to add to the last line of a run."""
        return f", {self.skipped} steps skipped: not finite" if self.skipped else ""


def _arrays(batch: PackedBatch) -> dict[str, np.ndarray]:
    return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if not f.metadata.get("static")}


def _static(batch: PackedBatch) -> dict[str, Any]:
    return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.metadata.get("static")}


@dataclasses.dataclass(frozen=True)
class NonFiniteBatch:
    """One batch of a dump: its step, its number among the accumulated ones, the origins of each sequence's segments."""

    step: int
    number: int
    batch: PackedBatch
    origins: tuple[tuple[Origin, ...], ...]


def _dumped(step: int, path: Path, report: dict[str, Any]) -> list[NonFiniteBatch]:
    batches = []
    with np.load(path) as file:
        for number, origins in enumerate(report["origins"]):
            fields = {n.partition(".")[2]: file[n] for n in file.files if n.startswith(f"{number}.")}
            sequences = tuple(tuple(Origin(*o) for o in sequence) for sequence in origins)
            batches.append(NonFiniteBatch(step, number, PackedBatch(**fields, **report["static"]), sequences))
    return batches


def read(folder: Path) -> list[NonFiniteBatch]:
    """Return the batches of a dump, of every process that wrote one.

    Raises:
      UserError: there are none; a damaged one, naming it.
    """
    batches = []
    for report in sorted(folder.glob(f"*.{REPORT}")):
        process = report.name.partition(".")[0]
        for step, values in json_files.read_object(report).items():
            path = folder / f"{step}.{process}.npz"
            try:
                batches += _dumped(int(step), path, values)
            except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                raise UserError(
                    f"{path} or {report.name} is damaged ({type(error).__name__}: {error}); let the run stop again"
                ) from error
    if not batches:
        raise UserError(f"{folder} holds no batches; a run that stops names the folder it writes them to")
    return sorted(batches, key=lambda d: (d.step, d.number))

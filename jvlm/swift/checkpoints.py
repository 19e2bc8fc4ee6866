"""Checkpoint folders as ms-swift names them, ``checkpoint-STEP`` in the run's folder, that other libraries read."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jvlm.parallel import hosts
from jvlm.training import processors
from jvlm.training.checkpointing import Checkpointing, is_scheduled
from jvlm.training.hooks import Hook
from jvlm.training.side_files import read_json
from jvlm.weights import hf, io, run_dir, table

if TYPE_CHECKING:
    from jvlm.data.processor import Processor
    from jvlm.models.vlm import VLM
    from jvlm.training.trainer import Trainer

ARGUMENTS = "args.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclasses.dataclass
class CheckpointFolders(Hook):
    """Writes a folder at each checkpoint: a Hugging Face model, or the adapter in PEFT's form where there is one.

    Each also gets the run's args.json, if it has one.

    Attributes:
      limit: folders that stay: the latest, and the best in place of the oldest of these; None keeps all.
      links: keep links named ``last`` and ``best``.
    """

    limit: int | None = None
    links: bool = False

    def on_train_start(self, trainer: Trainer) -> None:
        table.export_format(trainer.template.config)  # better refused now than at the first checkpoint
        if jax.process_count() > 1:
            hosts.log_rank0(
                "several processes train: checkpoint folders are not written during training, as no process has all "
                "parameters; jvlm convert RUN FOLDER writes one afterwards"
            )

    def goes_on(self, trainer: Trainer) -> str:
        place = _keeper(trainer).storage.folder / f"checkpoint-{trainer.step}"
        return f"--resume_from_checkpoint {place} goes on from there"

    def on_save(self, trainer: Trainer) -> None:
        if jax.process_count() > 1:
            return
        keeper = _keeper(trainer)
        if not is_scheduled(trainer, keeper.config.save_interval_steps):
            return
        run = keeper.storage.folder
        base = read_json(run / run_dir.EXPERIMENT, "restore the run")["init_from"]
        write(trainer.model, processors.load(run), run / f"checkpoint-{trainer.step}", base)
        best = keeper.best and keeper.best["step"]
        for step in stale(steps(run), best, self.limit):
            shutil.rmtree(run / f"checkpoint-{step}")
        if self.links:
            _link(run, best)


def _keeper(trainer: Trainer) -> Checkpointing:
    return next(hook for hook in trainer.hooks if isinstance(hook, Checkpointing))


def write(model: VLM, processor: Processor, folder: Path, base: str | None) -> None:
    """Write a checkpoint folder, with tokenizer and image settings: whole, or not at all.

    Args:
      base: what a model with adapters stands on.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if model.adapters is None:
        hf.save(model, processor, part, dtype=None)
    else:
        io.save(model, processor, part, "peft", base=base)
        hf.write_processor(part, model.config, processor)
    arguments = folder.parent / ARGUMENTS
    if arguments.is_file():
        shutil.copy(arguments, part / ARGUMENTS)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def steps(run: Path) -> list[int]:
    """Return the steps of a run's checkpoint folders, ascending."""
    found = (_NAME.fullmatch(path.name) for path in run.iterdir()) if run.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def stale(found: Iterable[int], best: int | None, limit: int | None) -> list[int]:
    """Return the steps whose folders go, where ``limit`` stay: the latest, the best among them.

    The last one and the best one always stay.
    """
    ordered = sorted(found)
    if limit is None or not ordered:
        return []
    others = [step for step in ordered[:-1] if step != best]
    certain = {ordered[-1], *({best} & set(ordered))}
    room = max(limit - len(certain), 0)
    return others[: len(others) - room]


def _link(run: Path, best: int | None) -> None:
    for name, step in (("last", max(steps(run))), ("best", best)):
        link = run / name
        link.unlink(missing_ok=True)
        if step is not None:
            link.symlink_to(f"checkpoint-{step}", target_is_directory=True)

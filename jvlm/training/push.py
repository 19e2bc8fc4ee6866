"""Uploads of a run: of each checkpoint while it trains, or of its result. None of them ends the training."""

from __future__ import annotations

import concurrent.futures
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from jvlm.adapters import attach
from jvlm.adapters.peft_write import write_peft
from jvlm.data.processor import Processor
from jvlm.errors import UserError
from jvlm.hub import card as cards
from jvlm.hub import uploads
from jvlm.hub.card import Card
from jvlm.hub.ids import is_dataset_id, parse_dataset, require_id
from jvlm.models import vlm
from jvlm.models.vlm import VLM
from jvlm.training.checkpointing import is_scheduled
from jvlm.training.config import Experiment
from jvlm.training.hooks import Hook
from jvlm.training.trainer import Trainer
from jvlm.weights import hf, run_dir
from jvlm.weights.io import load

FOLDER = "push"


def check(experiment: Experiment) -> None:
    """Raise now what an upload would raise after hours: a name that is no id, or checkpoints of several processes."""
    config = experiment.push
    if config.hub_model_id is None:
        return
    require_id(config.hub_model_id)
    if config.every == "best" and not experiment.validation.enabled:
        raise UserError(
            "push.every best needs a validation (validation.data or validation.split) that says which it is"
        )
    if config.every == "all" and jax.process_count() > 1:
        raise UserError(
            f"push.every all: one process writes checkpoints, and there are {jax.process_count()}; take last or best "
            "(jvlm sft: --hub_strategy end or best)"
        )


def card_of(experiment: Experiment, model: VLM, scores: Mapping[str, float] | None = None) -> Card:
    """Return the card of a run's result: base and data as far as they have ids, scores, the license of the base."""
    start = experiment.init_from
    patterns = [pattern for pattern in experiment.data.train if is_dataset_id(pattern)]
    folder = run_dir.local(start, weights=False) if start else None
    return Card(
        base_model=cards.base_id(start),
        relation="adapter" if model.adapters is not None else "finetune",
        license=cards.license_of(folder),
        datasets=tuple(dict.fromkeys(parse_dataset(pattern).id.repo for pattern in patterns)),
        tags=(model.config.family,),
        scores=dict(scores or {}),
    )


def write_folder(model: VLM, processor: Processor, folder: Path, experiment: Experiment) -> None:
    """Write what is uploaded: a PEFT folder of a model with adapters, else a Hugging Face folder."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    if model.adapters is None:
        hf.save(model, processor, folder, dtype=experiment.export.dtype)
        return
    base = cards.base_id(experiment.init_from)
    write_peft(attach.extract(model), model.config, folder, base_name=base)
    hf.write_processor(folder, model.config, processor)


def push_result(
    experiment: Experiment, model: VLM, processor: Processor, run: Path, scores: Mapping[str, float] | None
) -> str:
    """Upload the result of a run, or its best checkpoint. Returns the address of the commit.

    Raises: as `jvlm.hub.upload`.
    """
    config = experiment.push
    if config.every == "best":
        model, processor = load(run, precision=model.config.precision, step="best")
    folder = run / FOLDER / "result"
    write_folder(model, processor, folder, experiment)
    report = uploads.upload(
        folder,
        config.hub_model_id,
        private=config.private,
        message=f"{experiment.name}: {'best checkpoint' if config.every == 'best' else 'result'}",
        card=card_of(experiment, model, scores),
    )
    shutil.rmtree(run / FOLDER)
    print(report.text())
    return str(report.url)


class PushCheckpoints(Hook):
    """Uploads each checkpoint, one after the other, while the training goes on.

    Attributes:
      failures: one line for each that did not arrive.
    """

    def __init__(self, experiment: Experiment, processor: Processor, run: Path):
        self.experiment, self.processor, self.run = experiment, processor, run
        self.failures: list[str] = []
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="push")

    def on_save(self, trainer: Trainer) -> None:
        if not is_scheduled(trainer, self.experiment.checkpoint.save_interval_steps):
            return
        step, model = trainer.step, _model(trainer)
        folder = self.run / FOLDER / f"checkpoint-{step}"
        try:  # the parameters are written now: the next step overwrites them
            write_folder(model, self.processor, folder, self.experiment)
        except Exception as error:  # noqa: BLE001  (an upload never ends the training; `failures` has it)
            self._failed(step, error)
            return
        self._worker.submit(self._send, folder, step, card_of(self.experiment, model))

    def _send(self, folder: Path, step: int, card: Card) -> None:
        config = self.experiment.push
        message = f"{self.experiment.name}: step {step}"
        try:
            uploads.upload(folder, config.hub_model_id, private=config.private, message=message, card=card)
        except Exception as error:  # noqa: BLE001  (as above)
            self._failed(step, error)
        shutil.rmtree(folder, ignore_errors=True)

    def _failed(self, step: int, error: Exception) -> None:
        self.failures.append(f"step {step}: {error}")
        print(f"upload of step {step} FAILED ({type(error).__name__}: {error}); training goes on", file=sys.stderr)

    def on_stop(self, trainer: Trainer, error: BaseException | None) -> None:
        self._worker.shutdown(wait=True)


def _model(trainer: Trainer) -> VLM:
    return vlm.bind(trainer.template, {**trainer.state.params, **trainer.evaluated_params()})

"""A run of an experiment: its stages in order, each from its last checkpoint on, with the hooks that every run has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from jvlm.adapters import targets
from jvlm.data import pipeline
from jvlm.data.example_source import matching
from jvlm.data.mixture.examples import Examples
from jvlm.data.mixture.table import table
from jvlm.data.position import Share
from jvlm.data.processor import Processor
from jvlm.data.subset import Subset
from jvlm.errors import UserError
from jvlm.models.vlm import VLM
from jvlm.parallel import hosts
from jvlm.parallel.layout import MeshLayout
from jvlm.training import hub_pins, push
from jvlm.training.checkpoint import Checkpoints
from jvlm.training.checkpointing import Checkpointing, StorageSync
from jvlm.training.compiled_step import step_arguments
from jvlm.training.config import AdaptConfig, EvaluationConfig, Experiment, PushConfig, ValidationConfig
from jvlm.training.data_counters import DataCounters
from jvlm.training.data_record import DataRecord
from jvlm.training.goodput import Goodput
from jvlm.training.interruption import StopRequests, stopped
from jvlm.training.log import TrainingLog, clock
from jvlm.training.nonfinite import NonFiniteMonitor
from jvlm.training.profile import Profile
from jvlm.training.resolve import check_ahead, describe, resolve
from jvlm.training.resume import CHANGES, prepare_folder
from jvlm.training.run_storage import RunStorage
from jvlm.training.source_curves import SourceCurves
from jvlm.training.starting_model import base_of, start_model
from jvlm.training.task_scores import TaskScores
from jvlm.training.throughput import LearningRates, Throughput
from jvlm.training.trainer import Trainer
from jvlm.training.validation import Validation
from jvlm.training.validation_data import ValidationData
from jvlm.training.validation_split import Split, split_data, without_held_out
from jvlm.weights.run_dir import CHECKPOINTS


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run leaves: the model, where it is, and how long it trained (seconds, restarts included).

    Attributes:
      steps: of all stages.
      last: the step whose checkpoint holds this model.
      failed_uploads: of checkpoints; one line each.
    """

    model: VLM
    processor: Processor
    storage: RunStorage
    steps: int
    last: int
    seconds: float
    compilations: int
    rejected: int
    failed_uploads: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of the small files; see `RunStorage`."""
        return self.storage.folder


def train(experiment: Experiment) -> Result:
    """Train the stages and then the experiment's own data, each to its end or from its last checkpoint on.

    Raises:
      UserError: data of any stage, or to evaluate on, is not there (raised before the first is trained); the folder
        holds a different experiment; data too bad; no checkpoint can be read; too little space for the checkpoints.
      Diverged: too many steps in a row were not finite.
      Interrupted: a signal or a preemption notice asked to stop; the last step is saved.
    """
    results: list[Result] = []
    push.check(experiment)
    experiment, pins = hub_pins.pin(experiment, [run.name for run in runs_of(experiment)[:-1]])
    runs = runs_of(experiment)
    for run in runs:
        if not run.data.train and run.data.mixture is None:
            raise UserError(
                f"{run.name}: no data to train on; give files on the command line as --data.train examples.jsonl, or "
                'in the config as data=DataConfig(train=("examples.jsonl",))'
            )
    for pattern in (p for run in runs for p in (*run.data.files, *run.evaluation.data, *run.validation.data)):
        matching(pattern)
    split = _split(experiment)
    for number, run in enumerate(runs, 1):
        if experiment.stages:
            hosts.log_rank0(f"stage {number} of {len(experiment.stages) + 1}: {run.name}")
        results.append(_train_one(run, experiment if number == 1 else None, runs[number:], split, pins))
    return dataclasses.replace(
        results[-1],
        steps=sum(r.steps for r in results),
        seconds=sum(r.seconds for r in results),
        compilations=sum(r.compilations for r in results),
        rejected=sum(r.rejected for r in results),
    )


def runs_of(experiment: Experiment) -> list[Experiment]:
    """Return each stage as an experiment that goes on from the one before it, and the experiment itself."""
    runs = []
    for stage in experiment.stages:
        run = dataclasses.replace(
            experiment,
            name=f"{experiment.name}/stages/{stage.name}",
            data=stage.data,
            optimizer=stage.optimizer,
            steps=stage.steps,
            stages=(),
            validation=ValidationConfig(),
            evaluation=EvaluationConfig(),
            push=PushConfig(),
        )
        runs.append(run)
        start = str(RunStorage(run.output_root, run.name).folder)
        # once is enough
        experiment = dataclasses.replace(
            experiment, init_from=start, adapt=AdaptConfig(), encoder_from=None, decoder_from=None, adapters_from=None
        )
    return [*runs, experiment]


def _split(experiment: Experiment) -> Split | None:
    """Return which of the experiment's training examples are held out; its stages are not trained on them either."""
    if not experiment.validation.split:
        return None
    storage = RunStorage(experiment.output_root, experiment.name)
    storage.pull()
    return split_data(experiment.data, experiment.validation.split, experiment.seed, storage.folder)


def _train_one(
    experiment: Experiment,
    job: Experiment | None,
    later: Sequence[Experiment],
    split: Split | None,
    pins: Mapping[str, str],
) -> Result:
    """Train one run. Before the first one, the data of ``later`` ones and of the ``job``'s evaluation is checked."""
    layout = MeshLayout.of(experiment.parallel)
    model, processor = start_model(experiment, layout.parameter)
    parts = layout.mesh.shape["context"]
    # processes that meet for the first time must do so within seconds, and checking ahead can take longer
    hosts.barrier("made the model")
    if job is not None:
        hosts.run_on_all(lambda: check_ahead(job, later, processor, parts))
    storage = RunStorage(experiment.output_root, experiment.name)
    storage.pull()
    examples = None
    if split is not None:
        own = experiment.validation.split > 0
        examples = Examples.open(experiment.data).subset(split.train) if own else None
        examples = examples or without_held_out(experiment.data, split.held_out)
    experiment = resolve(experiment, model, processor, storage.folder, parts, examples)
    arguments = step_arguments(experiment, model)  # refuses what cannot be trained, before a folder is made for it
    changes = prepare_folder(storage.folder, experiment, processor)
    if model.adapters is not None and hosts.is_rank0():
        model.adapters.write(storage.folder)
    hub_pins.write(storage.folder, pins)
    storage.share()
    checkpointing = Checkpointing(storage, experiment.checkpoint, base_of(experiment))
    trainer = Trainer(model, **arguments, layout=layout, use_ema=experiment.optimizer.use_ema)
    del model
    hosts.log_rank0(describe(experiment, trainer.template, layout))
    if trainer.template.adapters is not None:
        hosts.log_rank0("\n".join(targets.report(trainer.template)))
    shard = trainer.shard
    batches, draws = pipeline.training_data(
        processor, experiment.data, seed=experiment.seed, share=Share(shard.index, shard.count), examples=examples
    )
    if draws.examples.is_mixture:
        hosts.log_rank0(table(draws, experiment.data))
    counters = DataCounters(
        storage.folder,
        draws.plan.examples_per_pass,
        experiment.data,
        counts=shard.is_primary_reader,
        sources=draws.examples.sizes() if draws.examples.is_mixture else {},
    )
    monitor = NonFiniteMonitor(storage.folder, storage.store, experiment.stop_after_skips)
    log = TrainingLog(storage.folder, experiment.log_interval_steps, changes)
    tokens = experiment.data.batch_size * experiment.data.seq_len
    throughput = Throughput(trainer.template, trainer.compiled.trainable, tokens)
    accepted = hosts.broadcast_from_0((storage.folder / CHANGES).is_file())
    validation = ()
    if experiment.validation.enabled:
        sources = _validation_sources(experiment, processor, split, Share(shard.index, shard.count))
        names = experiment.data.sources
        validation = (Validation(sources, experiment.validation, checkpointing, throughput, names),)
    pushes = ()
    if experiment.push.hub_model_id and experiment.push.every == "all":
        pushes = (push.PushCheckpoints(experiment, processor, storage.folder),)
    tasks = ()
    if experiment.evaluation.tasks:
        tasks = (TaskScores(experiment.evaluation, processor, storage.folder),)
    trainer.hooks = (
        checkpointing,
        StorageSync(storage),
        StopRequests(),
        *validation,
        *tasks,
        counters,
        DataRecord(draws, experiment, accepted=accepted),
        log,
        *((SourceCurves(experiment.data.sources),) if experiment.data.sources else ()),
        monitor,
        LearningRates(experiment.optimizer, experiment.steps, lambda: monitor.skipped),
        throughput,
        Goodput(storage.folder),
        Profile(storage.folder, experiment.profile),
        *pushes,
        *experiment.hooks,
    )
    experiment.task.before_training(trainer, processor, experiment)
    trainer.fit(batches, steps=experiment.steps)
    if trainer.step < experiment.steps and not trainer.finished:
        raise stopped(trainer, experiment.steps, storage.store / CHECKPOINTS)
    last = trainer.step
    if experiment.validation.returns_best and checkpointing.best is not None:
        last = checkpointing.best["step"]
        hosts.log_rank0(f"the best checkpoint, of step {last}, is what this run returns")
    if last != trainer.step:
        with Checkpoints(storage.store, experiment.checkpoint, use_ema=trainer.use_ema) as checkpoints:
            trainer.state, _ = checkpoints.restore(last, trainer.state)
    compilations, rejected = trainer.compiled.step.compilations, counters.rejected()
    hosts.log_rank0(
        f"{trainer.step} steps in {clock(log.seconds)}, {compilations} compilation(s), {counters.summary(rejected)}"
        + monitor.summary()
    )
    storage.push()
    # the average, where one is kept and asked for: a run returns what it measured
    trainer.state = dataclasses.replace(trainer.state, trainable=trainer.evaluated_params())
    failed = tuple(line for hook in pushes for line in hook.failures)
    return Result(
        trainer.model,
        processor,
        storage,
        trainer.step,
        last,
        log.seconds,
        compilations,
        rejected,
        failed,
    )


def _validation_sources(
    experiment: Experiment, processor: Processor, split: Split | None, share: Share
) -> dict[str, ValidationData]:
    """Return the data of each source that is validated on: files of its own, or what is held out of training files."""
    config = experiment.data
    if experiment.validation.data:  # which may be of another format than what is trained on
        config = dataclasses.replace(config, train=experiment.validation.data, mixture=None, format="auto")
    whole, held_out = Examples.open(config), None if split is None else frozenset(split.validation)
    chosen = {
        name: [index for index in indices if held_out is None or index in held_out]
        for name, indices in whole.groups(config).items()
    }
    return {
        name: ValidationData(processor, config, Subset(whole, indices), share)
        for name, indices in chosen.items()
        if indices
    }

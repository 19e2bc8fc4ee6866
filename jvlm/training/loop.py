"""The training loop: batch, loss, gradient, update, log."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from flax import nnx

from jvlm.data import pipeline, survey
from jvlm.data.packing import PackedRows
from jvlm.data.position import Share
from jvlm.data.processor import Processor
from jvlm.data.shards import matching
from jvlm.errors import UserError
from jvlm.evaluation import usable
from jvlm.models import vlm
from jvlm.models.vlm import TOWERS, VLM, VLMConfig
from jvlm.parallel import data_shards, hosts
from jvlm.parallel.layout import MeshLayout
from jvlm.training import compiled_step, flops, optimizer, processors, resume, train_step
from jvlm.training.checkpoint import Checkpoints
from jvlm.training.config import AdaptConfig, EvaluationConfig, Experiment
from jvlm.training.data_counters import DataCounters, Totals
from jvlm.training.goodput import Goodput
from jvlm.training.interruption import Interrupted, StopRequests
from jvlm.training.log import TrainingLog, clock
from jvlm.training.nonfinite import NonFiniteMonitor
from jvlm.training.profile import Profile
from jvlm.training.resume import prepare_folder
from jvlm.training.run_storage import RunStorage
from jvlm.weights import backbones, hf, positions, run_dir, upcycling
from jvlm.weights.io import load
from jvlm.weights.run_dir import CHECKPOINTS

# Rows looked at before a run. Where its length or its row sizes are taken from them, all of them are, however long
# that takes, so that the same data gives the same run.
_SAMPLE, _SECONDS = 512, 20.0


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run leaves: the model, its places, and how long it trained (seconds, restarts included).

    Attributes:
      steps: of all stages.
      last: the step whose checkpoint holds this model.
    """

    model: VLM
    processor: Processor
    home: RunStorage
    steps: int
    last: int
    seconds: float
    compilations: int
    rejected: int

    @property
    def folder(self) -> Path:
        """Where the small files are; see `RunStorage`."""
        return self.home.folder


def train(experiment: Experiment) -> Result:
    """Train the stages and then the experiment's own data, each to its end or from its last checkpoint on.

    Raises:
      UserError: data of any stage, or to evaluate on, is not there; said before the first one is trained.
      UserError: the folder holds a different experiment; data too bad; too many steps in a row were not finite; no
        checkpoint can be read; too little space for the checkpoints.
      Interrupted: a signal or a preemption notice asked to stop; the last step is saved.
    """
    results: list[Result] = []
    runs = runs_of(experiment)
    for run in runs:
        if not run.data.train:
            raise UserError(
                f"{run.name}: no data to train on; give files on the command line as --data.train rows.jsonl, or in "
                'the config as data=DataConfig(train=("rows.jsonl",))'
            )
    for pattern in (p for run in runs for p in (*run.data.train, *run.evaluation.data)):
        matching(pattern)
    for number, run in enumerate(runs, 1):
        if experiment.stages:
            hosts.log_rank0(f"stage {number} of {len(experiment.stages) + 1}: {run.name}")
        results.append(_train_one(run, experiment if number == 1 else None, runs[number:]))
    return dataclasses.replace(
        results[-1],
        steps=sum(r.steps for r in results),
        seconds=sum(r.seconds for r in results),
        compilations=sum(r.compilations for r in results),
        rejected=sum(r.rejected for r in results),
    )


def runs_of(experiment: Experiment) -> list[Experiment]:
    """The stages as experiments of their own, each going on from the one before it, and the experiment itself."""
    runs = []
    for stage in experiment.stages:
        run = dataclasses.replace(
            experiment,
            name=f"{experiment.name}/stages/{stage.name}",
            data=stage.data,
            optimizer=stage.optimizer,
            steps=stage.steps,
            stages=(),
            evaluation=EvaluationConfig(),
        )
        runs.append(run)
        start = str(RunStorage(run.output_root, run.name).folder)
        # once is enough
        experiment = dataclasses.replace(
            experiment, init_from=start, adapt=AdaptConfig(), encoder_from=None, decoder_from=None
        )
    return [*runs, experiment]


def _train_one(experiment: Experiment, job: Experiment | None, later: Sequence[Experiment]) -> Result:
    """Train one run. Before the first one, what comes ``later`` and the evaluation data of the ``job`` is looked at."""
    layout = MeshLayout.of(experiment.parallel)
    model, processor = start_model(experiment, layout.parameter)
    parts = layout.mesh.shape["context"]
    # processes that meet for the first time must do so within seconds, and looking ahead can take longer
    hosts.barrier("made the model")
    if job is not None:
        hosts.run_on_all(lambda: _look_ahead(job, later, processor, parts))
    home = RunStorage(experiment.output_root, experiment.name)
    folder = home.folder
    home.pull()
    experiment = resolve(experiment, model, processor, folder, parts)
    changes = prepare_folder(folder, experiment, processor)
    home.share()
    template, values = split(model)
    program = compiled_step.compile_step(experiment)
    state, frozen = program.begin(values)
    hosts.log_rank0(describe(experiment, template, layout))
    shard = data_shards.data_shard_for(program.batches.tokens)
    dataset, source = pipeline.training_data(
        processor, experiment.data, seed=experiment.seed, share=Share(shard.index, shard.count)
    )
    batches = iter(dataset)

    with Checkpoints(home.store, experiment.checkpoint) as checkpoints:
        start, useful = 0, 0.0
        guard = NonFiniteMonitor(folder, home.store, experiment.stop_after_skips)
        seen = DataCounters(folder, len(source), experiment.data, counts=shard.is_primary_reader)
        restored = checkpoints.restore_latest(state, frozen)
        if restored is not None:
            start, state, frozen, data = restored
            batches.set_state(data["iterator"])
            seen.restore(data["seen"], start)
            guard.restore(data["skips"])
            useful = data["useful"]
        checkpoints.check_space(state, frozen, range(start + 1, experiment.steps + 1))
        with (
            TrainingLog(folder, start, experiment.steps, writes=hosts.is_rank0()) as log,
            Goodput(folder, useful) as goodput,
            StopRequests() as requests,
            Profile(folder, experiment.profile) as profile,
        ):
            if start:
                log.say(f"resuming after step {start}")
            meter = Throughput(experiment, seen, template)
            for step in range(start + 1, experiment.steps + 1):
                profile.before(step - start)
                packed = meter.next_batch(batches, step)
                own = train_step.stack([rows.batch for rows in packed])
                batch, began = data_shards.make_global_batch(own, shard, program.batches), time.perf_counter()
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = program.step(state, frozen, batch)
                goodput.ran(began, metrics)
                profile.ran(step - start, metrics)
                guard.ran(step, packed, metrics)
                to_log = step % experiment.log_interval_steps == 0 or step in (start + 1, experiment.steps)
                if to_log or checkpoints.due(step):
                    guard.settle()
                if guard.stops:
                    said = guard.dump({**frozen, **state.params})
                    home.push()
                    raise UserError(said)
                if to_log:
                    totals = seen.totals()
                    line = {**meter.line(metrics, step, guard.skipped, totals), "goodput": goodput.share()}
                    log.write(step, line, {"accepted_changes": changes} if changes else None)
                    changes = []
                    seen.check(totals)
                asked = requests.after(step)
                if asked or step == experiment.steps or checkpoints.due(step):
                    data = {
                        "iterator": hosts.all_gather_concat(batches.get_state() if shard.is_primary_reader else []),
                        "seen": seen.state(),
                    }
                    data |= {"skips": guard.state(), "useful": goodput.seconds()}
                    checkpoints.save(step, state, frozen, data, force=True)
                    home.push()
                log.advance()
                if asked and step < experiment.steps:
                    checkpoints.wait()
                    raise Interrupted(
                        f"stopped by {asked} after step {step} of {experiment.steps}, which is saved in "
                        f"{home.store / CHECKPOINTS}; the same command goes on from there"
                    )
            seconds = log.elapsed()
    batches.close()
    compilations, rejected = program.step._cache_size(), seen.rejected()
    hosts.log_rank0(
        f"{experiment.steps} steps in {clock(seconds)}, {compilations} compilation(s), {seen.summary(rejected)}"
        + guard.summary()
    )
    model = vlm.bind(template, {**frozen, **state.params})
    home.push()
    return Result(model, processor, home, experiment.steps, experiment.steps, seconds, compilations, rejected)


def start_model(experiment: Experiment, sharding: hf.ShardingOf | None = None) -> tuple[VLM, Processor]:
    """The model to start from: a folder's weights, or random ones.

    Args:
      sharding: of a parameter, from its path and variable; None puts all on the first device.
    """
    if experiment.init_from is not None:
        precision = experiment.model.precision if experiment.model else None
        grow = experiment.adapt.grow_embedding
        model, processor = load(experiment.init_from, precision=precision, sharding=sharding, grow_embedding=grow)
        if experiment.adapt.grid is not None:
            model = positions.with_grid(model, experiment.adapt.grid, experiment.adapt.grid_scale)
        if experiment.adapt.experts is not None:
            model = upcycling.upcycle(model, experiment.adapt.experts, seed=experiment.seed, sharding=sharding)
        processor = processors.adapted(processor, experiment, model.config)
    else:
        processor = processors.new(experiment)
        model = random_model(experiment.model, experiment.seed, sharding)
        towers = [run_dir.local(place) for place in (experiment.encoder_from, experiment.decoder_from) if place]
        model = backbones.fill(model, towers, sharding)
    if experiment.data.media_root:
        processor = processor.replace(media_roots=(experiment.data.media_root,))
    return model, processor


def random_model(config: VLMConfig, seed: int, sharding: hf.ShardingOf | None) -> VLM:
    """A new model, each parameter made where it will live."""
    template = vlm.abstract(config)
    places = {path: sharding(path, v) for path, v in vlm.parameters(template).items()} if sharding else None

    def values() -> dict[str, jax.Array]:
        return {path: v.get_value() for path, v in vlm.parameters(VLM(config, rngs=nnx.Rngs(seed))).items()}

    return vlm.bind(template, jax.jit(values, out_shardings=places)())


def resolve(
    experiment: Experiment, model: VLM, processor: Processor, folder: Path | None = None, parts: int = 1
) -> Experiment:
    """The experiment with everything filled in that was left to be derived: from the run so far, else from the data.

    Args:
      folder: of the run; None for one that is not kept.
      parts: devices that share a packed row.

    Raises:
      UserError: data of which too little can be used.
    """
    experiment = dataclasses.replace(experiment, model=model.config, processor=processor.config)

    def look() -> dict[str, Any]:
        begun = folder is not None and run_dir.is_run(folder)
        known = resume.derived(experiment, folder) if begun else experiment
        found = _look(known, processor, parts)
        data = known.data if begun else found.config  # a run keeps what it began with, whatever a sample says now
        steps = known.steps or found.steps(known.epochs, data.batch_size * known.gradient_accumulation_steps)
        names = ("seq_len", "max_patches", "max_image_patches")
        return {"data": {name: getattr(data, name) for name in names}, "steps": steps}

    # all processes look, so that none waits for another; what the first one found holds for all
    chosen = hosts.broadcast_from_0(hosts.run_on_all(look))
    data = dataclasses.replace(experiment.data, **chosen["data"])
    return dataclasses.replace(experiment, data=data, steps=chosen["steps"])


def _look_ahead(job: Experiment, later: Sequence[Experiment], processor: Processor, parts: int) -> None:
    """Raise now what the data of later stages and of the evaluation would raise after hours."""
    for run in later:
        data = run.data
        found = survey.take(
            _reading(processor, data), data, seed=run.seed, count=_SAMPLE // 2, seconds=_SECONDS, parts=parts
        )
        found.check()
    config = job.evaluation
    if config.data:
        usable.check(config.data, _reading(processor, job.data), max_rows=config.max_rows)


def _reading(processor: Processor, data: pipeline.DataConfig) -> Processor:
    """The processor, looking for pictures where this data has them."""
    processor = copy.copy(processor)
    processor = processor.replace(media_roots=(data.media_root,) if data.media_root else ())
    return processor


def _look(experiment: Experiment, processor: Processor, parts: int) -> survey.Survey:
    """Look at the data before the first step, and say what was found."""
    data = experiment.data
    derives = experiment.steps is None or "auto" in (data.seq_len, data.max_patches)
    limit = {"count": _SAMPLE if derives else _SAMPLE // 2, "seconds": None if derives else _SECONDS}
    found = survey.take(processor, data, seed=experiment.seed, parts=parts, **limit)
    hosts.log_rank0(found.text())
    found.check()
    return found


def split(model: VLM) -> tuple[VLM, dict[str, jax.Array]]:
    """(template without arrays, path -> array)."""
    values = {path: v.get_value() for path, v in vlm.parameters(model).items()}
    return vlm.bind(model, {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in values.items()}), values


def describe(experiment: Experiment, template: VLM, layout: MeshLayout) -> str:
    """The start-up table: tower, parameters, trainable, learning rate; and the shape of a step."""
    counts = vlm.parameter_counts(template)
    lines = [f"{'tower':<12}{'parameters':>16}{'trainable':>16}{'learning rate':>16}"]
    for tower in TOWERS:
        rate = experiment.optimizer.rate_of(tower)
        learnt = counts[tower] if rate > 0 else 0
        lines.append(f"{tower:<12}{counts[tower]:>16,}{learnt:>16,}{rate if rate > 0 else 'frozen':>16}")
    data = experiment.data
    kind = layout.mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items() if size > 1)
    devices = f"{layout.mesh.size} x {kind}" + (f" ({axes})" if axes else "")
    precision = experiment.model.precision
    lines.append(
        f"{experiment.steps} steps of {experiment.gradient_accumulation_steps} x {data.batch_size} rows of "
        f"{data.seq_len} tokens and {data.max_patches} patches, on {devices}, {precision.param_dtype} parameters, "
        f"{precision.compute_dtype} compute"
    )
    return "\n".join(lines)


class Throughput:
    """Measures where the time goes and how full the rows are, between two log lines."""

    def __init__(self, experiment: Experiment, seen: DataCounters, template: VLM):
        self.experiment, self.seen, self.template = experiment, seen, template
        self._learnt = {tower: experiment.optimizer.rate_of(tower) > 0 for tower in TOWERS}
        self._peak = flops.peak(jax.devices()[0].device_kind)
        self._counted = True
        try:
            flops.of_batch(template, [], self._learnt)
        except TypeError as error:  # a new architecture can be trained before its arithmetic is declared
            self._counted = False
            hosts.log_rank0(f"the log has no tflops_per_s and mfu: {error}")
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._waited = self._flops = 0.0
        self._text: list[float] = []
        self._patches: list[float] = []

    def next_batch(self, batches: grain.DatasetIterator, step: int) -> list[PackedRows]:
        """The next step's batches, as many as are accumulated."""
        began = time.perf_counter()
        packed = list(itertools.islice(batches, self.experiment.gradient_accumulation_steps))
        self._waited += time.perf_counter() - began
        if self._counted:
            own = flops.of_batch(self.template, [rows.batch for rows in packed], self._learnt).total
            self._flops += own * self.seen.counts
        for rows in packed:
            self.seen.add(rows, step)
            self._text.append(rows.batch.text_padding)
            self._patches.append(rows.batch.patch_padding)
        return packed

    def line(self, metrics: dict[str, jax.Array], step: int, skipped: int, totals: Totals) -> dict[str, float]:
        values = {name: float(value) for name, value in metrics.items() if name != "skipped"}
        seconds = time.perf_counter() - self._since
        data = self.experiment.data
        places = len(self._text) * data.batch_size * data.seq_len
        own = [float(np.mean(self._text)), float(np.mean(self._patches)), self._waited, self._flops]
        text_padding, patch_padding, waited, arithmetic = np.asarray(hosts.all_gather_object(own)).mean(0).tolist()
        optimizer_config, updates = self.experiment.optimizer, step - skipped
        rates = {
            f"learning_rate/{t}": float(optimizer.schedule(optimizer_config, t, self.experiment.steps)(updates - 1))
            for t in TOWERS
            if optimizer_config.rate_of(t) > 0
        }
        highest = max(rates.values())
        # one number where the towers agree, as ms-swift users expect; a number each where they do not
        rates = {"learning_rate": highest} if len(set(rates.values())) == 1 else {"learning_rate": highest, **rates}
        line = {
            **{name: values.pop(name) for name in ("loss", "grad_norm")},
            **rates,
            "token_acc": values.pop("token_acc"),
            "epoch": round(totals.epoch, 3),
            "dropped": totals.dropped,
            "data_wait": waited / seconds,
            "padding_text": text_padding,
            "padding_patches": patch_padding,
            "tokens_per_s": places * (1 - text_padding) / seconds,
            **self._speed(arithmetic / seconds),
            **values,
            "skipped": skipped,
        }
        self._reset()
        return line

    def _speed(self, arithmetic: float) -> dict[str, float]:
        """Useful arithmetic of a device; its share of what the device could do, where that is known."""
        if not self._counted:
            return {}
        each = arithmetic / (jax.device_count() / jax.process_count())
        return {"tflops_per_s": each / 1e12, **({"mfu": each / self._peak} if self._peak else {})}

"""The training loop: batch, loss, gradient, update, log."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from pathlib import Path

import grain
import jax
import numpy as np
from flax import nnx

from jvlm import config as config_tree
from jvlm.data import packing, pipeline
from jvlm.data.errors import Rejected
from jvlm.data.packing import PackedRows
from jvlm.data.position import Share
from jvlm.data.processor import Processor, ProcessorConfig
from jvlm.data.shards import matching
from jvlm.models import vlm
from jvlm.models.vlm import TOWERS, VLM, VLMConfig
from jvlm.parallel import hosts
from jvlm.parallel.layout import Layout
from jvlm.training import flops, optimizer
from jvlm.training import program as planning
from jvlm.training import step as stepping
from jvlm.training.checkpoint import Checkpoints
from jvlm.training.config import AdaptConfig, EvaluationConfig, Experiment
from jvlm.training.goodput import Goodput
from jvlm.training.home import Home
from jvlm.training.interruption import Interrupted, StopRequests
from jvlm.training.log import TrainingLog, clock
from jvlm.training.nonfinite import Guard
from jvlm.training.profile import Profile
from jvlm.weights import backbones, checkpoint, loading, positions, run_folder, upcycling
from jvlm.weights.run_folder import CHECKPOINTS, EXPERIMENT, PROCESSOR

REJECTED = "rejected.jsonl"
# A restart may change these; anything else would make the rest of the run another experiment.
_FREE = (
    *("checkpoint", "evaluation", "export", "log_every", "stop_after_skips", "profile", "output_root"),
    *("data.read_threads", "data.prefetch", "parallel", "topologies"),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run leaves: the model, its places, and how long it trained (seconds, restarts included).

    Attributes:
      steps: of all stages.
      last: the step whose checkpoint holds this model.
    """

    model: VLM
    processor: Processor
    home: Home
    steps: int
    last: int
    seconds: float
    compilations: int
    rejected: int

    @property
    def folder(self) -> Path:
        """Where the small files are; see `Home`."""
        return self.home.folder


def train(experiment: Experiment) -> Result:
    """Train the stages and then the experiment's own data, each to its end or from its last checkpoint on.

    Raises:
      FileNotFoundError: data of any stage, or to evaluate on, is not there; said before the first one is trained.
      ValueError: the folder holds a different experiment; data too bad; too many steps in a row were not finite; no
        checkpoint can be read; too little space for the checkpoints.
      Interrupted: a signal or a preemption notice asked to stop; the last step is saved.
    """
    results: list[Result] = []
    runs = runs_of(experiment)
    for pattern in (p for run in runs for p in (*run.data.train, *run.evaluation.data)):
        matching(pattern)
    for number, run in enumerate(runs, 1):
        if experiment.stages:
            hosts.say(f"stage {number} of {len(experiment.stages) + 1}: {run.name}")
        results.append(_train_one(run))
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
        start = str(Home(run.output_root, run.name).folder)
        # once is enough
        experiment = dataclasses.replace(
            experiment, init_from=start, adapt=AdaptConfig(), encoder_from=None, decoder_from=None
        )
    return [*runs, experiment]


def _train_one(experiment: Experiment) -> Result:
    layout = Layout.of(experiment.parallel)
    model, processor = start_model(experiment, layout.parameter)
    experiment = resolve(experiment, model, processor)
    home = Home(experiment.output_root, experiment.name)
    folder = home.folder
    home.pull()
    prepare_folder(folder, experiment, processor)
    home.share()
    template, values = split(model)
    program = planning.plan(experiment)
    state, frozen = program.begin(values)
    hosts.say(describe(experiment, template, layout))
    part = hosts.part_of(program.batches.tokens)
    dataset, source = pipeline.training_data(
        processor, experiment.data, seed=experiment.seed, share=Share(part.index, part.count)
    )
    batches = iter(dataset)

    with Checkpoints(home.store, experiment.checkpoint) as checkpoints:
        start, useful = 0, 0.0
        guard = Guard(folder, home.store, experiment.stop_after_skips)
        seen = _Seen(folder, len(source), experiment.data, counts=part.counts)
        restored = checkpoints.restore_latest(state, frozen)
        if restored is not None:
            start, state, frozen, data = restored
            batches.set_state(data["iterator"])
            seen.restore(data["seen"], start)
            guard.restore(data["skips"])
            useful = data["useful"]
        checkpoints.check_space(state, frozen, range(start + 1, experiment.steps + 1))
        with (
            TrainingLog(folder, start, experiment.steps, writes=hosts.is_first()) as log,
            Goodput(folder, useful) as goodput,
            StopRequests() as requests,
            Profile(folder, experiment.profile) as profile,
        ):
            if start:
                log.say(f"resuming after step {start}")
            meter = _Meter(experiment, seen, template)
            for step in range(start + 1, experiment.steps + 1):
                profile.before(step - start)
                packed = meter.next_batch(batches, step)
                own = stepping.stack([rows.batch for rows in packed])
                batch, began = hosts.place(own, part.rows, program.batches), time.perf_counter()
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = program.step(state, frozen, batch)
                goodput.ran(began, metrics)
                profile.ran(step - start, metrics)
                guard.ran(step, packed, metrics)
                to_log = step % experiment.log_every == 0 or step in (start + 1, experiment.steps)
                if to_log or checkpoints.due(step):
                    guard.settle()
                if guard.stops:
                    said = guard.dump({**frozen, **state.params})
                    home.push()
                    raise ValueError(said)
                if to_log:
                    log.write(step, {**meter.line(metrics, step, guard.skipped), "goodput": goodput.share()})
                asked = requests.after(step)
                if asked or step == experiment.steps or checkpoints.due(step):
                    data = {"iterator": hosts.join(batches.get_state() if part.counts else []), "seen": seen.state()}
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
    compilations = program.step._cache_size()
    hosts.say(
        f"{experiment.steps} steps in {clock(seconds)}, {compilations} compilation(s), {seen.summary()}"
        + guard.summary()
    )
    model = vlm.bind(template, {**frozen, **state.params})
    home.push()
    return Result(model, processor, home, experiment.steps, experiment.steps, seconds, compilations, seen.rejected)


def start_model(experiment: Experiment, sharding: checkpoint.ShardingOf | None = None) -> tuple[VLM, Processor]:
    """The model to start from: a folder's weights, or random ones.

    Args:
      sharding: of a parameter, from its path and variable; None puts all on the first device.
    """
    if experiment.init_from is not None:
        numerics = experiment.model.numerics if experiment.model else None
        model, processor = loading.load(experiment.init_from, numerics=numerics, sharding=sharding)
        if experiment.adapt.grid is not None:
            model = positions.with_grid(model, experiment.adapt.grid, experiment.adapt.grid_scale)
        if experiment.adapt.experts is not None:
            model = upcycling.upcycle(model, experiment.adapt.experts, seed=experiment.seed, sharding=sharding)
        if experiment.processor is not None or experiment.adapt != AdaptConfig():
            settings = experiment.processor or processor.config
            processor = Processor(processor.tokenizer, model.config, settings, generation=processor.generation)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(run_folder.local(experiment.tokenizer)), local_files_only=True)
        config = experiment.model
        backbones.add_placeholder(tokenizer, config)
        model = random_model(config, experiment.seed, sharding)
        towers = [run_folder.local(place) for place in (experiment.encoder_from, experiment.decoder_from) if place]
        model = backbones.fill(model, towers, sharding)
        processor = Processor(tokenizer, config, experiment.processor or ProcessorConfig())
    if experiment.data.media_root:
        processor.media_roots = (experiment.data.media_root,)
    return model, processor


def random_model(config: VLMConfig, seed: int, sharding: checkpoint.ShardingOf | None) -> VLM:
    """A new model, each parameter made where it will live."""
    template = vlm.abstract(config)
    places = {path: sharding(path, v) for path, v in vlm.parameters(template).items()} if sharding else None

    def values() -> dict[str, jax.Array]:
        return {path: v.get_value() for path, v in vlm.parameters(VLM(config, rngs=nnx.Rngs(seed))).items()}

    return vlm.bind(template, jax.jit(values, out_shardings=places)())


def resolve(experiment: Experiment, model: VLM, processor: Processor) -> Experiment:
    """The experiment with everything filled in that was left to be derived."""
    steps = hosts.agree(experiment.steps or estimate_steps(experiment, processor))
    return dataclasses.replace(experiment, model=model.config, processor=processor.config, steps=steps)


def estimate_steps(experiment: Experiment, processor: Processor, sample: int = 512) -> int:
    """Steps that ``epochs`` take, from packing up to ``sample`` rows spread evenly over the data."""
    data = experiment.data
    source = pipeline.RowSource(data.train)
    encode = pipeline.Encode(processor, data)
    chosen = np.unique(np.linspace(0, len(source) - 1, min(sample, len(source))).astype(int))
    rng = np.random.default_rng(experiment.seed)
    encoded = (encode.random_map(source[int(i)], rng) for i in chosen)
    examples = [e for e in encoded if not isinstance(e, Rejected)]
    if not examples:
        raise ValueError(f"none of {len(chosen)} rows sampled from {', '.join(source.files)} can be used")
    rows = len(packing.best_fit_decreasing(examples, data.row_tokens, data.row_patches))
    per_step = data.rows * experiment.accumulation
    return max(1, math.ceil(experiment.epochs * rows * len(source) / len(chosen) / per_step))


def prepare_folder(folder: Path, experiment: Experiment, processor: Processor) -> None:
    """Create the run folder, or check that it holds this same experiment."""
    resolved = config_tree.to_dict(experiment)
    path = folder / EXPERIMENT
    if path.is_file():
        changed = [
            line
            for line in config_tree.differences(json.loads(path.read_text()), resolved)
            if not line.startswith(_FREE)
        ]
        if changed:
            raise ValueError(
                f"{folder} holds another experiment; remove it or choose another --name. Differences:\n  "
                + "\n  ".join(changed)
            )
    hosts.wait("checked the run folder")
    if hosts.is_first():
        (folder / PROCESSOR).mkdir(parents=True, exist_ok=True)
        checkpoint.write_processor(folder / PROCESSOR, experiment.model, processor)
        path.write_text(json.dumps(resolved, indent=2) + "\n")
    hosts.wait("wrote the run folder")


def split(model: VLM) -> tuple[VLM, dict[str, jax.Array]]:
    """(template without arrays, path -> array)."""
    values = {path: v.get_value() for path, v in vlm.parameters(model).items()}
    return vlm.bind(model, {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in values.items()}), values


def describe(experiment: Experiment, template: VLM, layout: Layout) -> str:
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
    numerics = experiment.model.numerics
    lines.append(
        f"{experiment.steps} steps of {experiment.accumulation} x {data.rows} rows of {data.row_tokens} tokens and "
        f"{data.row_patches} patches, on {devices}, {numerics.param_dtype} parameters, "
        f"{numerics.compute_dtype} compute"
    )
    return "\n".join(lines)


class _Seen:
    """Counts conversations read and rows left out; lists the latter in rejected.jsonl."""

    def __init__(self, folder: Path, rows: int, config: pipeline.DataConfig, *, counts: bool):
        name = REJECTED if hosts.is_first() else f"{jax.process_index()}.{REJECTED}"
        self.path, self.rows, self.config = folder / name, rows, config
        self.counts, self.conversations, self.rejected = counts, 0, 0

    def add(self, packed: PackedRows, step: int) -> None:
        if not self.counts:  # another process reads the same
            return
        self.conversations += packed.conversations
        self.rejected += len(packed.rejected)
        if packed.rejected:
            with open(self.path, "a") as file:
                for row in packed.rejected:
                    file.write(json.dumps({**dataclasses.asdict(row), "step": step}) + "\n")
            self._check()

    def _check(self) -> None:
        read = self.conversations + self.rejected
        if self.config.on_bad_row == "skip" and read >= 100 and self.rejected > self.config.max_bad_fraction * read:
            raise ValueError(
                f"{self.rejected} of {read} rows were left out, more than data.max_bad_fraction = "
                f"{self.config.max_bad_fraction}; they are listed in {self.path}"
            )

    def epoch(self) -> float:
        """Passes over the data, of all processes; each must ask."""
        return sum(sum(state.values()) for state in self.state()) / self.rows

    def state(self) -> list[dict[str, int]]:
        """Of every process; each must ask."""
        return hosts.gather({"conversations": self.conversations, "rejected": self.rejected})

    def restore(self, states: list[dict[str, int]], step: int) -> None:
        """Each process goes on from its share of what all have seen."""
        index, count = jax.process_index(), jax.process_count()
        for name in ("conversations", "rejected"):
            total = sum(state[name] for state in states)
            setattr(self, name, total // count + (index < total % count))
        if self.path.is_file():
            lines = [json.loads(text) for text in self.path.read_text().splitlines()]
            kept = [line for line in lines if line["step"] <= step]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def summary(self) -> str:
        """What was read, by all processes; each must ask."""
        states = self.state()
        conversations, rejected = (sum(state[name] for state in states) for name in ("conversations", "rejected"))
        epochs = (conversations + rejected) / self.rows
        where = f" (listed in {self.path})" if rejected else ""
        return f"{conversations} conversations = {epochs:.2f} epochs, {rejected} rows left out{where}"


class _Meter:
    """Measures where the time goes and how full the rows are, between two log lines."""

    def __init__(self, experiment: Experiment, seen: _Seen, template: VLM):
        self.experiment, self.seen, self.template = experiment, seen, template
        self._learnt = {tower: experiment.optimizer.rate_of(tower) > 0 for tower in TOWERS}
        self._peak = flops.peak(jax.devices()[0].device_kind)
        self._counted = True
        try:
            flops.of_batch(template, [], self._learnt)
        except TypeError as error:  # a new architecture can be trained before its arithmetic is declared
            self._counted = False
            hosts.say(f"the log has no tflops_per_s and mfu: {error}")
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._waited = self._flops = 0.0
        self._text: list[float] = []
        self._patches: list[float] = []

    def next_batch(self, batches: grain.DatasetIterator, step: int) -> list[PackedRows]:
        """The next step's batches, as many as are accumulated."""
        began = time.perf_counter()
        packed = list(itertools.islice(batches, self.experiment.accumulation))
        self._waited += time.perf_counter() - began
        if self._counted:
            own = flops.of_batch(self.template, [rows.batch for rows in packed], self._learnt).total
            self._flops += own * self.seen.counts
        for rows in packed:
            self.seen.add(rows, step)
            self._text.append(rows.batch.text_padding)
            self._patches.append(rows.batch.patch_padding)
        return packed

    def line(self, metrics: dict[str, jax.Array], step: int, skipped: int) -> dict[str, float]:
        values = {name: float(value) for name, value in metrics.items() if name != "skipped"}
        seconds = time.perf_counter() - self._since
        data = self.experiment.data
        places = len(self._text) * data.rows * data.row_tokens
        own = [float(np.mean(self._text)), float(np.mean(self._patches)), self._waited, self._flops]
        text_padding, patch_padding, waited, arithmetic = np.asarray(hosts.gather(own)).mean(0).tolist()
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
            "epoch": round(self.seen.epoch(), 3),
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
